"""The token contract: prompt and response are encoded apart, special tokens once, EOS only where a response ended.

Strategy: the tiny tokenizer, whose ids for the special tokens are known: 0 pad, 1 end, 2 system, 3 user, 4 assistant.
"""

import json
import shutil

import pytest

from data_contracts.errors import ConfigError
from stages.models.tokens import context_length, encode_prompt, encode_response, load_tokenizer, stop_ids, token_facts

HELLO = [{"role": "user", "content": "the sea"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_the_tokenizer_is_the_one_in_the_file(tiny_model, tokenizer):
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert len(tokenizer) == raw.get_vocab_size() == 320
    for text in ("Say three words.", "  é\n\tλ 🦊", ""):
        assert ids(tokenizer, text) == raw.encode(text).ids
        assert tokenizer.decode(ids(tokenizer, text)) == text


def test_a_chat_prompt_is_the_template_ready_for_the_answer(tokenizer):
    assert encode_prompt(tokenizer, HELLO, "chat") == [3, *ids(tokenizer, "the sea"), 1, 4]
    talk = [
        {"role": "system", "content": "a"},
        *HELLO,
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    expected = [
        2,
        *ids(tokenizer, "a"),
        1,
        3,
        *ids(tokenizer, "the sea"),
        1,
        4,
        *ids(tokenizer, "b"),
        1,
        3,
        *ids(tokenizer, "c"),
        1,
        4,
    ]
    assert encode_prompt(tokenizer, talk, "chat") == expected


def test_a_plain_prompt_is_the_text_as_it_is(tokenizer):
    assert encode_prompt(tokenizer, HELLO, "plain") == ids(tokenizer, "the sea")
    assert encode_prompt(tokenizer, [*HELLO, *HELLO], "plain") == ids(tokenizer, "the sea\nthe sea")


def test_a_template_that_writes_the_bos_does_not_get_a_second_one(shared):
    # This tokenizer puts <s> (1) before every text by itself, and so does its template.
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    assert encode_prompt(tokenizer, HELLO, "chat").count(1) == 1
    assert encode_prompt(tokenizer, HELLO, "plain").count(1) == 1
    assert 1 not in encode_response(tokenizer, "Once upon a time")[:-1]


def test_a_response_that_ended_carries_one_eos(tokenizer):
    assert encode_response(tokenizer, "the sea") == [*ids(tokenizer, "the sea"), 1]


def test_prompt_and_response_meet_at_the_seam_whatever_the_text(tokenizer):
    # "the" and " sea" could merge across a seam if they were encoded together.
    prompt, response = (
        encode_prompt(tokenizer, [{"role": "user", "content": "the s"}], "plain"),
        encode_response(tokenizer, "ea"),
    )
    assert tokenizer.decode(prompt + response) == "the sea<|end|>"
    assert prompt + response[:-1] != ids(tokenizer, "the sea")


def test_a_tokenizer_without_eos_is_refused(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no EOS token"):
        encode_response(load_tokenizer(model), "the sea")


@pytest.mark.parametrize(("named", "expected"), [(None, [1]), (1, [1]), ([4, 0], [0, 1, 4]), (7, [1, 7])])
def test_a_response_ends_at_every_id_that_model_or_tokenizer_name(model, tokenizer, named, expected):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert stop_ids(model, tokenizer) == expected
    (model / "generation_config.json").unlink()
    assert stop_ids(model, tokenizer) == [1]


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


def test_the_record_tells_templates_and_tokenizers_apart(model, tiny_model, tokenizer):
    here = token_facts(tiny_model, tokenizer, "chat")
    assert here == token_facts(model, load_tokenizer(model), "chat")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    other = token_facts(model, load_tokenizer(model), "chat")
    assert other["tokenizer_digest"] == here["tokenizer_digest"] and other["template_digest"] != here["template_digest"]
    assert token_facts(tiny_model, tokenizer, "plain") == here | {"template": "plain", "template_digest": ""}
