"""Stages - where each token lies in a response's text: offsets of a tokenization, and of ids that a policy sampled.

A sampled response need not be what the tokenizer would make of its text, so its offsets come from the bytes of its own tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from data_contracts.errors import ConfigError


def encode_with_spans(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[np.ndarray]]:
    """Token ids and character spans [T, 2] of each text, without special tokens.

    Raises: ConfigError if the tokenizer cannot tell offsets.
    """
    check_offsets(tokenizer)
    if not texts:
        return [], []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in encoded["offset_mapping"]]


def check_offsets(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', tokenizer)!r} ({type(tokenizer).__name__}) has no character offsets, and "
            "weights across tokenizers need them: use a model whose tokenizer has a tokenizer.json"
        )


class TokenText:
    """Reads ids back to text and spans, for byte-level BPE and for SentencePiece-style tokenizers with `▁`; others by encoding again."""

    def __init__(self, tokenizer: Any):
        check_offsets(tokenizer)
        self.tokenizer = tokenizer
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        marked = {entry["id"] for entry in model["added_tokens"] if entry["special"] and not _is_byte(entry["content"])}
        self.specials = marked | set(tokenizer.all_special_ids)
        self.pieces = self._pieces(model)
        self.byte_ids = {number for token, number in tokenizer.get_vocab().items() if _is_byte(token)}

    def _pieces(self, model: dict[str, Any]) -> list[bytes] | None:
        """The bytes of every id; a special token has none. None if the tokens' strings do not spell the text."""
        described = json.dumps([model.get("decoder"), model.get("pre_tokenizer")])
        plain = {entry["id"]: entry["content"] for entry in model["added_tokens"]}
        if "ByteLevel" in described:
            table = {character: byte for byte, character in _byte_level_alphabet().items()}
            spell = lambda token: bytes(table[character] for character in token)  # noqa: E731
        elif model["model"]["type"] in ("BPE", "Unigram"):
            spell = _spell_piece
        else:
            return None
        pieces = [b""] * (max(self.tokenizer.get_vocab().values()) + 1)
        for token, number in self.tokenizer.get_vocab().items():
            if number in self.specials:
                continue
            try:
                byte_token = spell is _spell_piece and _is_byte(token)
                pieces[number] = plain[number].encode() if number in plain and not byte_token else spell(token)
            except KeyError:  # not of the byte alphabet: it can only be meant literally
                pieces[number] = token.encode()
        return pieces

    def read(self, ids: Sequence[int]) -> tuple[str, np.ndarray | None]:
        """Text of the ids without special tokens, and spans [T, 2]; None if they cannot be found. A special token has an empty span.

        A token that holds part of a character spans the whole of it.
        """
        plain = [number for number in ids if number not in self.specials]
        text = self.tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self.pieces is None:
            return text, self._encoded_again(ids, text)
        parts = [self.pieces[number] if 0 <= number < len(self.pieces) else b"" for number in ids]
        if self.byte_ids:
            _replace_broken_runs(parts, [number in self.byte_ids for number in ids])
        spelled, character = _decode(b"".join(parts))
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        character = np.append(character, len(spelled))
        spans = np.stack(
            (character[starts], np.where(ends > starts, character[ends - 1] + 1, character[starts])), axis=1
        )
        for dropped in (0, 1):  # SentencePiece decoders drop the space of the first piece
            if spelled[dropped:] == text and (not dropped or spelled[0] == " "):
                return text, np.maximum(spans - dropped, 0)
        return text, self._encoded_again(ids, text)

    def _encoded_again(self, ids: Sequence[int], text: str) -> np.ndarray | None:
        (again,), (spans,) = encode_with_spans(self.tokenizer, [text])
        return spans if list(again) == list(ids) else None


def _replace_broken_runs(parts: list[bytes], single: list[bool]) -> None:
    """Byte fallback, in place: a run of byte tokens that is not UTF-8 as a whole becomes one U+FFFD per byte."""
    begin = 0
    for is_byte, run in groupby(single):
        end = begin + sum(1 for _ in run)
        if is_byte:
            try:
                b"".join(parts[begin:end]).decode()
            except UnicodeDecodeError:
                parts[begin:end] = ["\ufffd".encode()] * (end - begin)
        begin = end


def _decode(data: bytes) -> tuple[str, np.ndarray]:
    """UTF-8 with U+FFFD for what is not, and the character that each byte ends up in [len(data)]."""
    try:
        text = data.decode()
        lead = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
        return text, np.cumsum(lead) - 1
    except UnicodeDecodeError:
        pass
    owner = np.zeros(len(data), dtype=np.int64)
    decoder, text, begin = codecs.getincrementaldecoder("utf-8")("strict"), "", 0
    at = 0
    while at < len(data):
        try:
            piece = decoder.decode(data[at : at + 1])
            at += 1
        except UnicodeDecodeError:
            # What came before this byte is a broken character; the byte itself may begin a good one.
            decoder.reset()
            broken = max(at, begin + 1)
            owner[begin:broken] = len(text)
            text, begin, at = text + "\ufffd", broken, broken
            continue
        if piece:
            owner[begin:at] = len(text)
            text, begin = text + piece, at
    if begin < len(data):
        owner[begin:] = len(text)
        text += "\ufffd"
    return text, owner


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _spell_piece(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if _is_byte(token) else token.replace("▁", " ").encode()
