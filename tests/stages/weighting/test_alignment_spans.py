"""Text and spans of sampled ids, which need not be what the tokenizer would make of the text."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_contracts.errors import ConfigError
from stages.weighting.weights.spans import TokenText, encode_with_spans

SHARED = Path(os.environ.get("SELFPLAY_SHARED") or Path(__file__).resolve().parents[4] / "shared")
CORPUS = ["the cat sat on the mat.", "naïve café — 東京 🍎 ok", "def f(x):\n\treturn x\n", "a  b   c\n\n"] * 3


@cache
def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: a space before the text, bytes for unknown characters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")


MADE = {"byte_level": byte_level, "sentence_piece": sentence_piece}


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from("the cat\n\té東🍎.\u0301 x"), max_size=30))
def test_ids_of_a_text_read_back_to_the_tokenizers_own_offsets(kind, text):
    tokenizer = MADE[kind]()
    (ids,), (offsets,) = encode_with_spans(tokenizer, [text])
    read, spans = TokenText(tokenizer).read(ids)
    assert read == text
    # The space that a SentencePiece tokenizer adds stands before the text: a piece of its own spans nothing, where the tokenizer's
    # offsets name the first character.
    added = (spans[:, 0] == 0) & (spans[:, 1] == 0)
    assert np.array_equal(spans[~added], offsets[~added]) and (kind != "byte_level" or not added.any())


def test_a_split_the_tokenizer_would_not_make_has_spans_too():
    tokenizer = byte_level()
    vocabulary = tokenizer.get_vocab()
    (canonical,), _ = encode_with_spans(tokenizer, ["the cat"])
    letters = [vocabulary[character] for character in ("t", "h", "e", "Ġ", "c", "a", "t")]
    assert letters != canonical
    text, spans = TokenText(tokenizer).read(letters)
    assert text == "the cat" and spans.tolist() == [[i, i + 1] for i in range(7)]


def test_bytes_of_one_character_all_span_it():
    tokenizer = byte_level()
    alphabet = {byte: character for character, byte in zip(*_alphabet(), strict=True)}
    apple = [tokenizer.get_vocab()[alphabet[byte]] for byte in "🍎".encode()]
    text, spans = TokenText(tokenizer).read([*apple, tokenizer.get_vocab()["o"]])
    assert text == "🍎o" and spans.tolist() == [[0, 1]] * 4 + [[1, 2]]


def test_a_response_cut_inside_a_character_ends_with_the_replacement_character():
    tokenizer = byte_level()
    alphabet = {byte: character for character, byte in zip(*_alphabet(), strict=True)}
    ids = [tokenizer.get_vocab()["o"], *(tokenizer.get_vocab()[alphabet[byte]] for byte in "🍎".encode()[:2])]
    text, spans = TokenText(tokenizer).read(ids)
    assert text == "o�" and spans.tolist() == [[0, 1], [1, 2], [1, 2]]
    # A broken character followed by a good one
    ids += [tokenizer.get_vocab()["o"]]
    text, spans = TokenText(tokenizer).read(ids)
    assert text == "o�o" and spans.tolist() == [[0, 1], [1, 2], [1, 2], [2, 3]]


def _alphabet() -> tuple[list[str], list[int]]:
    from stages.weighting.weights.spans import _byte_level_alphabet

    table = _byte_level_alphabet()
    return list(table.values()), list(table.keys())


def test_special_tokens_have_no_text():
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    text, spans = TokenText(tokenizer).read([tokenizer.get_vocab()["o"], end, tokenizer.get_vocab()["o"], end])
    assert text == "oo" and spans.tolist() == [[0, 1], [1, 1], [1, 2], [2, 2]]
    assert TokenText(tokenizer).read([])[1].shape == (0, 2)


def test_other_tokenizers_are_encoded_again_or_left_alone():
    tokenizer = word_piece()
    (ids,), _ = encode_with_spans(tokenizer, ["the cat"])
    text, spans = TokenText(tokenizer).read(ids)
    assert text == "the cat" and len(spans) == len(ids)
    letters = [tokenizer.get_vocab()["t"], tokenizer.get_vocab()["##h"], tokenizer.get_vocab()["##e"]]
    assert TokenText(tokenizer).read(letters)[1] is None


def test_a_tokenizer_without_offsets_is_refused_by_name():
    class Slow:
        is_fast = False
        name_or_path = "models/slow"

    with pytest.raises(ConfigError, match=r"models/slow.*no character offsets"):
        encode_with_spans(Slow(), ["a"])


@pytest.mark.parametrize("name", ["gpt2", "mistral-7b-v0.1"])
def test_random_ids_of_real_tokenizers(name):
    path = SHARED / "data" / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}; set SELFPLAY_SHARED")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    reader, draw, unread = TokenText(tokenizer), np.random.default_rng(0), 0
    for _ in range(200):
        ids = draw.integers(3, len(tokenizer), draw.integers(1, 40)).tolist()
        text, spans = reader.read(ids)
        unread += spans is None
        if spans is not None:
            assert (
                len(spans) == len(ids)
                and (np.diff(spans[:, 0]) >= 0).all()
                and (spans <= len(text)).all()
                and (spans >= 0).all()
            )
    assert not unread  # though random ids are full of broken characters
