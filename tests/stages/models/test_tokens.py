"""A tokenizer cuts text as its own tokenizer.json says, whatever class transformers makes of it.

Strategy: the tiny tokenizer, and one dressed up as DeepSeek's, R1-Distill-Llama's and Yi's are: byte-level, called a Llama tokenizer.
"""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from data_contracts.errors import ConfigError
from stages.models.tokens import SAMPLES, context_length, load_tokenizer, tokenizer_digest, vocabulary_size

TEXTS = (*SAMPLES, "we need to add 9 and 6", "  two  leading", "  é\n\tλ 🦊", "", "a  b")


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def ids(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def set_up(model, **settings) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_tokenizer_is_the_one_in_the_file(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    raw = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert len(tokenizer) == raw.get_vocab_size() == 320
    for text in TEXTS:
        assert ids(tokenizer, text) == raw.encode(text).ids
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_byte_level_tokenizer_that_calls_itself_a_llama_tokenizer_keeps_its_spaces(model, name):
    set_up(model, tokenizer_class=name)
    raw = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer = load_tokenizer(model)
    for text in TEXTS:
        assert ids(tokenizer, text) == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert tokenizer.chat_template == load_tokenizer(model).chat_template is not None


def test_real_tokenizers_cut_text_as_their_files_do(shared):
    # transformers 5 takes a leading space away from the first two.
    for name in ("llama-2", "mistral-7b-v0.1", "qwen1.5-base"):
        directory = shared / "data" / "tokenizers" / name
        tokenizer, raw = load_tokenizer(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
        for text in TEXTS:
            expected = raw.encode(text, add_special_tokens=False).ids
            assert ids(tokenizer, text) == expected
            assert tokenizer.decode(expected) == raw.decode(expected, skip_special_tokens=False)


def test_a_tokenizer_that_loses_spaces_is_refused(model):
    description = json.loads((model / "tokenizer.json").read_text())
    description["decoder"] = {"type": "Replace", "pattern": {"String": "Ġ"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"loses spaces: .* comes back as 'Weneedtoadd9and6\.'"):
        load_tokenizer(model)


def test_a_broken_tokenizer_is_one_sentence(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(model)


def test_a_digest_tells_tokenizers_apart_not_templates(model, tiny_model):
    assert tokenizer_digest(model) == tokenizer_digest(tiny_model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert tokenizer_digest(model) == tokenizer_digest(tiny_model)
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + "\n")
    assert tokenizer_digest(model) != tokenizer_digest(tiny_model)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 256}, 256),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({}, None),
    ],
)
def test_the_context_is_what_the_model_was_built_for(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == expected


@pytest.mark.parametrize(
    ("config", "expected"), [({"vocab_size": 5}, 5), ({"text_config": {"vocab_size": 8}}, 8), ({}, None), (None, None)]
)
def test_the_vocabulary_is_the_rows_of_the_embedding(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert vocabulary_size(tmp_path) == expected
