"""Stages - where each token lies in a response's text: offsets of a tokenization, and of ids that a policy sampled.

A sampled response need not be what the tokenizer would make of its text, so its offsets come from the bytes of its own
tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data_contracts.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""U+FFFD, for bytes that are not UTF-8."""


def encode_with_spans(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Token ids and character spans [T, 2] of each text, without special tokens.

    Raises: ConfigError if the tokenizer has no character offsets.
    """
    check_offsets(tokenizer)
    if not texts:
        return [], []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in encoded["offset_mapping"]]


def check_offsets(tokenizer: Any) -> None:
    """Raises: ConfigError if the tokenizer has no character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        name = getattr(tokenizer, "name_or_path", tokenizer)
        raise ConfigError(
            f"the tokenizer {name!r} ({type(tokenizer).__name__}) has no character offsets, and weights across "
            "tokenizers need them: use a model whose tokenizer has a tokenizer.json"
        )


class TokenText:
    """Reads ids back to text and spans.

    It reads byte-level BPE and SentencePiece-style tokenizers with `▁` by the bytes of their tokens, and other
    tokenizers by encoding the text again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        check_offsets(tokenizer)
        self.tokenizer = tokenizer
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        marked = {entry["id"] for entry in model["added_tokens"] if entry["special"] and not _is_byte(entry["content"])}
        self.specials = marked | set(tokenizer.all_special_ids)
        self.pieces = self._pieces(model)
        self.byte_ids = {number for token, number in tokenizer.get_vocab().items() if _is_byte(token)}

    def _pieces(self, model: dict[str, Any]) -> list[bytes] | None:
        """The bytes of every id; a special token has none. None if the tokens' strings do not spell the text."""
        spell = _speller(model)
        if spell is None:
            return None
        vocabulary = self.tokenizer.get_vocab()
        added = {entry["id"]: entry["content"] for entry in model["added_tokens"]}
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, number in vocabulary.items():
            if number in self.specials:
                continue
            is_byte_token = spell is _spell_piece and _is_byte(token)
            if number in added and not is_byte_token:
                pieces[number] = added[number].encode()
                continue
            try:
                pieces[number] = spell(token)
            except KeyError:  # not of the byte alphabet: it can only be meant literally
                pieces[number] = token.encode()
        return pieces

    def read(self, ids: Sequence[int]) -> tuple[str, np.ndarray | None]:
        """Text of the ids without special tokens, and spans [T, 2]; None if the spans cannot be determined.

        A special token has an empty span. A token that holds part of a character spans the whole of it.
        """
        plain = [number for number in ids if number not in self.specials]
        text = cast("str", self.tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if self.pieces is None:
            return text, self._spans_by_encoding(ids, text)
        parts = [self.pieces[number] if 0 <= number < len(self.pieces) else b"" for number in ids]
        if self.byte_ids:
            _replace_broken_runs(parts, [number in self.byte_ids for number in ids])
        spelled, character = _decode(b"".join(parts))
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        character = np.append(character, len(spelled))
        span_ends = np.where(ends > starts, character[ends - 1] + 1, character[starts])
        spans = np.stack((character[starts], span_ends), axis=1)
        if spelled == text:
            return text, np.maximum(spans, 0)
        if spelled[1:] == text and spelled[0] == " ":  # SentencePiece decoders drop the space of the first piece
            return text, np.maximum(spans - 1, 0)
        return text, self._spans_by_encoding(ids, text)

    def _spans_by_encoding(self, ids: Sequence[int], text: str) -> np.ndarray | None:
        """Spans of the text's own tokenization [T, 2]; None if its ids are others."""
        (encoded_ids,), (spans,) = encode_with_spans(self.tokenizer, [text])
        if list(encoded_ids) != list(ids):
            return None
        return spans


def _speller(model: dict[str, Any]) -> Callable[[str], bytes] | None:
    """The function from a token's string to its bytes, for a tokenizer.json; None if there is none."""
    described = json.dumps([model.get("decoder"), model.get("pre_tokenizer")])
    if "ByteLevel" in described:
        return _spell_byte_level
    if model["model"]["type"] in ("BPE", "Unigram"):
        return _spell_piece
    return None


def _replace_broken_runs(parts: list[bytes], is_byte_token: list[bool]) -> None:
    """Byte fallback, in place: a run of byte tokens that is not UTF-8 as a whole becomes one U+FFFD per byte."""
    begin = 0
    for is_byte, run in groupby(is_byte_token):
        end = begin + sum(1 for _ in run)
        if is_byte:
            try:
                b"".join(parts[begin:end]).decode()
            except UnicodeDecodeError:
                parts[begin:end] = [REPLACEMENT.encode()] * (end - begin)
        begin = end


def _decode(data: bytes) -> tuple[str, np.ndarray]:
    """UTF-8 with U+FFFD for invalid bytes, and the character that each byte ends up in [len(data)]."""
    try:
        text = data.decode()
        is_lead = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        return text, np.cumsum(is_lead) - 1
    except UnicodeDecodeError:
        pass
    owner = np.zeros(len(data), dtype=np.int64)
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    text, begin, position = "", 0, 0
    while position < len(data):
        try:
            piece = decoder.decode(data[position : position + 1])
            position += 1
        except UnicodeDecodeError:
            # What came before this byte is a broken character; the byte itself may begin a good one.
            decoder.reset()
            broken = max(position, begin + 1)
            owner[begin:broken] = len(text)
            text, begin, position = text + REPLACEMENT, broken, broken
            continue
        if piece:
            owner[begin:position] = len(text)
            text, begin = text + piece, position
    if begin < len(data):
        owner[begin:] = len(text)
        text += REPLACEMENT
    return text, owner


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + number) for number, byte in enumerate(unprintable)}
    return {byte: chr(byte) for byte in printable} | shifted


_BYTES = {character: byte for byte, character in _byte_level_alphabet().items()}


def _spell_byte_level(token: str) -> bytes:
    """The bytes of a byte-level token. Raises: KeyError for a character outside the alphabet."""
    return bytes(_BYTES[character] for character in token)


def _is_byte(token: str) -> bool:
    """Whether the token stands for one byte, as <0x0A> does."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _spell_piece(token: str) -> bytes:
    """The bytes of a SentencePiece-style token."""
    if _is_byte(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
