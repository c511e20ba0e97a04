"""Stages - text of data as token ids: `<|im_end|>` in a user's text is ten characters, not the end of a turn.

A tokenizer turns the text of a control token into that token, wherever the text came from. What a template writes must
become control tokens, what stands in the data must not. So texts of data that hold such a text are encoded by a twin of
the tokenizer, in which the control tokens have other names; all others, by the tokenizer as it is.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_contracts.errors import ConfigError
from stages.models.templates import literals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NONCE = f"zq{secrets.token_hex(8)}"
"""Part of the other names: of this process, not to be guessed, so that no data holds it; it has no influence on any
id."""


class TextEncoder:
    """Encodes texts of data with one tokenizer, whose control tokens have the texts `controls`."""

    def __init__(self, tokenizer: Any, controls: Iterable[str]):
        self.tokenizer, self.controls = tokenizer, sorted(set(controls) - {""})
        self.pattern = literals(self.controls)
        self.firsts = sorted({text[0] for text in self.controls})

    def special(self, text: str) -> str | None:
        """The first text of a control token in `text`, or None."""
        if not any(first in text for first in self.firsts):
            return None
        match = self.pattern.search(text)
        if match is None:
            return None
        return match.group()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        if self.special(text) is None:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return self.twin.encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, texts: Sequence[str]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Ids and character spans [T, 2] of each text, without special tokens."""
        if not texts:
            return [], []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        for number, text in enumerate(texts):
            if self.special(text) is not None:
                literal = self.twin.encode(text, add_special_tokens=False)
                ids[number], spans[number] = literal.ids, literal.offsets
        return ids, [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in spans]

    def encode_written(self, write: Callable[[list[str]], str], contents: Sequence[str]) -> list[int]:
        """Ids of `write(contents)`: what `write` adds may be control tokens, what stands in the contents may not."""
        if not any(self.special(text) for text in contents):
            return list(self.tokenizer(write(list(contents)), add_special_tokens=False).input_ids)
        held: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            return held.setdefault(match.group(), f"{NONCE}d{len(held)}x")

        hidden = [self.pattern.sub(hide, text) for text in contents]
        text = self.pattern.sub(lambda match: _name(self.controls, match.group()), write(hidden))
        for original, name in held.items():
            text = text.replace(name, original)
        return self.twin.encode(text, add_special_tokens=False).ids

    @property
    def twin(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens: their ids, and everything else, are the same.

        Raises: ConfigError for a tokenizer that is not made of a tokenizer.json.
        """
        return _twin(self.tokenizer, tuple(self.controls))


def _name(controls: Sequence[str], control: str) -> str:
    """How a twin calls a control token."""
    return f"<{NONCE}c{controls.index(control)}x>"


@lru_cache(maxsize=8)
def _twin(tokenizer: Any, controls: tuple[str, ...]) -> Tokenizer:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} ({type(tokenizer).__name__}) has no "
            "tokenizer.json, so special tokens in the data cannot be written as text: "
            "set sampling.special_tokens_in_data to drop or refuse"
        )
    names = {control: _name(controls, control) for control in controls}
    description = json.loads(backend.to_str())
    for entry in description["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    model = description["model"]
    # SentencePiece's own `<s>` can be the outcome of a merge of `<s` and `>`.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    if merges:
        model["merges"] = [pair for pair in merges if "".join(pair) not in names]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
