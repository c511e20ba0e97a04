"""Stages - prompt and two candidates -> the token ids that PairRM was trained on.

    [CLS] <|source|> S [SEP] [CLS] <|candidate1|> A [SEP] [CLS] <|candidate2|> B [SEP]

Three encodings, each with its own [CLS] and [SEP], laid end to end. The source is cut to 1224 ids with its three control ids, each
candidate to 412 + (1224 - ids of the source) // 2; the right end is cut, the [SEP] stays. At most 2048 in all.

transformers 5 rebuilds a DeBERTa tokenizer with a normaliser of its own and loses the NFKC map of the sentencepiece model; one logit of a
pair with full-width letters moves by 0.4. So the tokenizer is made here, on the `tokenizers` library alone, from tokenizer.json or
spm.model.

Texts cannot forge a marker: its literal is blanked, the tokenizer knows no marker (no normalised variant becomes one), and positions are
computed from lengths, never searched. llm-blender 0.0.2 stops at such a text with an error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.errors import ConfigError

MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
"""In the order of their ids, behind the vocabulary."""
CONTROLS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
_FORGED = re.compile("|".join(map(re.escape, (*MARKERS, *CONTROLS))))


class Limits(NamedTuple):
    source: int = 1224
    """Ids of a source, with [CLS], marker and [SEP]."""
    candidate: int = 412
    """Ids of a candidate beside the longest source; half of what a shorter one leaves is added."""

    def candidate_beside(self, source_length: int) -> int:
        return self.candidate + (self.source - source_length) // 2


def blank(text: str) -> str:
    """A space for every marker and control token that a text spells out."""
    return _FORGED.sub(" ", text)


class PairTokenizer:
    """Text -> ids, with the markers' ids beside."""

    def __init__(self, backend: Any, first_marker: int, limits: Limits):
        self.backend, self.limits = backend, limits
        self.cls_id, self.sep_id, self.pad_id = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
        self.source_id, self.first_id, self.second_id = first_marker, first_marker + 1, first_marker + 2

    def source(self, text: str) -> list[int]:
        return self._segment(text, self.source_id, self.limits.source)

    def candidate(self, text: str, source_length: int) -> list[int]:
        """Marked as the first one; the marker is at index 1."""
        return self._segment(text, self.first_id, self.limits.candidate_beside(source_length))

    def _segment(self, text: str, marker: int, limit: int) -> list[int]:
        ids = self.backend.encode(blank(text), add_special_tokens=False).ids
        return [self.cls_id, marker, *ids[: limit - 3], self.sep_id]


def load_tokenizer(directory: Path, limits: Limits) -> PairTokenizer:
    """From tokenizer.json (of transformers 4) or spm.model. Raises: ConfigError if neither is there, or the NFKC map is lost."""
    from tokenizers import Tokenizer

    charsmap = _charsmap(directory / "spm.model")
    if (directory / "tokenizer.json").is_file():
        data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        if "Precompiled" not in json.dumps(data.get("normalizer")):
            if charsmap is None:
                raise ConfigError(
                    f"{directory}/tokenizer.json has lost the NFKC map (saved by transformers 5), and there is no spm.model to restore it from: "
                    "scores of texts beyond ASCII would be wrong. Copy spm.model from microsoft/deberta-v3-large beside it"
                )
            data["normalizer"] = json.loads(_from_spm(directory / "spm.model").to_str())["normalizer"]
        size = len(data["model"]["vocab"])
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in MARKERS]
        data["truncation"] = data["padding"] = None
        backend = Tokenizer.from_str(json.dumps(data))
        first = added.get(MARKERS[0], max(size, *(id + 1 for token, id in added.items() if token not in MARKERS)))
        if any(added.get(marker, first + number) != first + number for number, marker in enumerate(MARKERS)):
            raise ConfigError(f"{directory}/tokenizer.json has PairRM's markers in another order than {MARKERS}")
    elif charsmap is not None:
        backend = _from_spm(directory / "spm.model")
        first = backend.get_vocab_size()
    else:
        raise ConfigError(
            f"{directory} has neither tokenizer.json nor spm.model: PairRM needs the tokenizer of microsoft/deberta-v3-large"
        )
    return PairTokenizer(backend, first, limits)


def _proto(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _charsmap(path: Path) -> bytes | None:
    return _proto(path).normalizer_spec.precompiled_charsmap if path.is_file() else None


def _from_spm(path: Path) -> Any:
    """As transformers 4.57 converts a DeBERTa-v3 sentencepiece model: strip, NFKC map, one space; always a leading space."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    proto = _proto(path)
    if proto.trainer_spec.model_type != 1:
        raise ConfigError(f"{path} is no unigram sentencepiece model: not DeBERTa-v3's tokenizer")
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps = [
        normalizers.Strip(),
        *([normalizers.Precompiled(charsmap)] if charsmap else []),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    kinds = [(piece.piece, piece.type == 3) for piece in proto.pieces if piece.type in (3, 4)]
    backend.add_tokens([AddedToken(piece, normalized=False, special=special) for piece, special in kinds])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    return backend
