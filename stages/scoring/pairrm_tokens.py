"""Stages - a prompt and two candidates -> the token ids that PairRM was trained on.

    [CLS] <|source|> S [SEP] [CLS] <|candidate1|> A [SEP] [CLS] <|candidate2|> B [SEP]

Three encodings, each with its own [CLS] and [SEP], stand end to end. The source is cut to 1224 ids with its three
control ids, each candidate to 412 + (1224 - ids of the source) // 2; the right end is cut, the [SEP] stays. At most
2048 in all.

transformers 5 rebuilds a DeBERTa tokenizer with a normaliser of its own and loses the NFKC map of the sentencepiece
model: one logit of a pair with full-width letters moves by 0.4. So the tokenizer is made here from tokenizer.json or
spm.model, on the `tokenizers` library alone.

Texts cannot forge a marker: its literal is blanked, the tokenizer knows no marker (no normalised variant becomes one),
and positions follow from lengths, they are never searched. llm-blender 0.0.2 stops at such a text with an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_contracts.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
"""In the order of their ids, which follow the vocabulary."""
CONTROLS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
_FORGED = re.compile("|".join(map(re.escape, (*MARKERS, *CONTROLS))))
UNIGRAM = 1
"""sentencepiece's trainer_spec.model_type of DeBERTa-v3."""
CONTROL_PIECE, USER_PIECE = 3, 4
"""sentencepiece's types of pieces that no text is cut into."""


class Limits(NamedTuple):
    """Where texts are cut."""

    source: int = 1224
    """Ids of a source, with [CLS], marker and [SEP]."""
    candidate: int = 412
    """Ids of a candidate beside the longest source; half of what a shorter source leaves is added."""

    def candidate_beside(self, source_length: int) -> int:
        """Ids that a candidate may have beside a source of this length."""
        return self.candidate + (self.source - source_length) // 2


def blank(text: str) -> str:
    """The text with a space for every marker and control token that it spells out."""
    return _FORGED.sub(" ", text)


class PairTokenizer:
    """Turns texts into ids, with the markers' ids around them."""

    def __init__(self, backend: Tokenizer, first_marker: int, limits: Limits):
        """`first_marker`: the id of <|source|>; the others follow."""
        self.backend, self.limits = backend, limits
        self.cls_id, self.sep_id, self.pad_id = (self._id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
        self.source_id, self.first_id, self.second_id = first_marker, first_marker + 1, first_marker + 2

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ConfigError(f"the tokenizer has no {token}: it is not that of DeBERTa-v3")
        return number

    def source(self, text: str) -> list[int]:
        """The ids of a prompt."""
        return self._segment(text, self.source_id, self.limits.source)

    def candidate(self, text: str, source_length: int) -> list[int]:
        """The ids of a candidate, marked as the first one; the marker is at index 1."""
        return self._segment(text, self.first_id, self.limits.candidate_beside(source_length))

    def _segment(self, text: str, marker: int, limit: int) -> list[int]:
        ids = self.backend.encode(blank(text), add_special_tokens=False).ids
        return [self.cls_id, marker, *ids[: limit - 3], self.sep_id]


def load_tokenizer(directory: Path, limits: Limits) -> PairTokenizer:
    """The tokenizer in tokenizer.json (of transformers 4) or spm.model.

    Raises: ConfigError if neither is there, or if the NFKC map is lost.
    """
    settings_path, pieces_path = directory / "tokenizer.json", directory / "spm.model"
    if settings_path.is_file():
        backend, first_marker = _from_settings(settings_path, pieces_path)
    elif pieces_path.is_file():
        backend = _from_pieces(pieces_path)
        first_marker = backend.get_vocab_size()
    else:
        raise ConfigError(
            f"{directory} has neither tokenizer.json nor spm.model: "
            "PairRM needs the tokenizer of microsoft/deberta-v3-large"
        )
    return PairTokenizer(backend, first_marker, limits)


def _from_settings(path: Path, pieces_path: Path) -> tuple[Tokenizer, int]:
    """The tokenizer of tokenizer.json, and the id of its first marker."""
    from tokenizers import Tokenizer

    settings = json.loads(path.read_text(encoding="utf-8"))
    if "Precompiled" not in json.dumps(settings.get("normalizer")):
        if not pieces_path.is_file():
            raise ConfigError(
                f"{path} has lost the NFKC map (saved by transformers 5), and there is no spm.model to restore it "
                "from: "
                "scores of texts beyond ASCII would be wrong. Copy spm.model from microsoft/deberta-v3-large beside it"
            )
        settings["normalizer"] = json.loads(_from_pieces(pieces_path).to_str())["normalizer"]
    added = {token["content"]: token["id"] for token in settings["added_tokens"]}
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in MARKERS]
    settings["truncation"] = settings["padding"] = None
    first_marker = added.get(MARKERS[0])
    if first_marker is None:
        ends = [number + 1 for token, number in added.items() if token not in MARKERS]
        first_marker = max([len(settings["model"]["vocab"]), *ends])
    if any(added.get(marker, first_marker + number) != first_marker + number for number, marker in enumerate(MARKERS)):
        raise ConfigError(f"{path} has PairRM's markers in another order than {MARKERS}")
    return Tokenizer.from_str(json.dumps(settings)), first_marker


def _pieces(path: Path) -> Any:
    """The sentencepiece model in a file: a protobuf message without Python types."""
    from sentencepiece import sentencepiece_model_pb2

    model = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - made at import, unknown to type checkers
    model.ParseFromString(path.read_bytes())
    return model


def _from_pieces(path: Path) -> Tokenizer:
    """The tokenizer of spm.model, as transformers 4.57 converts one of DeBERTa-v3: strip, NFKC map, one space; always a
    leading space."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    sentencepiece = _pieces(path)
    if sentencepiece.trainer_spec.model_type != UNIGRAM:
        raise ConfigError(f"{path} is no unigram sentencepiece model: not DeBERTa-v3's tokenizer")
    vocabulary = [(piece.piece, piece.score) for piece in sentencepiece.pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=sentencepiece.trainer_spec.unk_id, byte_fallback=False))
    steps: list[Any] = [normalizers.Strip()]
    if charsmap := sentencepiece.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    backend.normalizer = normalizers.Sequence(steps)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([metaspace])
    uncut = [piece for piece in sentencepiece.pieces if piece.type in (CONTROL_PIECE, USER_PIECE)]
    backend.add_tokens(
        [AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL_PIECE) for piece in uncut]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    return backend
