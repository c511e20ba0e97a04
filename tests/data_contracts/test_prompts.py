"""Prompt files of our own format: whatever is wrong is said with the file and the line.

Strategy: every error has one bad line behind one good one, so the number 2 must be in the message.
"""

import json

import pytest

from data_contracts.errors import ConfigError
from data_contracts.prompts import load_prompts, own_line, text_of

GOOD = '{"prompt_id": "a", "prompt": "Name a fruit."}'


def load(tmp_path, *lines: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_prompts(path)


def test_a_line_becomes_a_row_with_every_column(tmp_path):
    full = {
        "prompt_id": "b", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "checks": [{"value": 3, "name": "max_words"}], "response": "Hello.", "chosen": "Hey.", "rejected": "Go.", "source": "mine",
    }  # fmt: skip
    short, long = load(tmp_path, GOOD, "", json.dumps(full))
    none = {"response": None, "chosen": None, "rejected": None}
    assert (
        short
        == {"prompt_id": "a", "messages": [{"role": "user", "content": "Name a fruit."}], "checks": "[]", "source": ""}
        | none
    )
    assert long == full | {"checks": '[{"name": "max_words", "value": 3}]'}
    assert text_of(long) == "Be brief.\nHi"


def test_a_prompt_without_an_id_is_named_by_its_text(tmp_path):
    one, two = load(tmp_path, '{"prompt": "one"}', '{"prompt": "two"}')
    again = load(tmp_path, '{"messages": [{"content": "two", "role": "user"}]}')[0]
    assert len(one["prompt_id"]) == 16 and one["prompt_id"] != two["prompt_id"] == again["prompt_id"]


def test_the_same_text_twice_without_ids_is_a_duplicate(tmp_path):
    with pytest.raises(ConfigError, match="line 2: the prompt_id .* was already used in line 1"):
        load(tmp_path, '{"prompt": "one"}', '{"prompt": "one"}')


MESSAGES = '{"messages": %s}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r"is not valid JSON: Expecting ',' delimiter at column 15"),
        (r'{"prompt": "\ud83e"}', "holds half of a surrogate pair"),
        ("prompt: x", "is not valid JSON: Expecting value at column 1"),
        ('["x"]', "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('{"prompt": "x", "promptid": "b"}', r"unknown field\(s\) \['promptid'\]; known: .*'prompt_id'"),
        ('{"prompt_id": "b"}', 'needs exactly one of "messages" and "prompt"'),
        ('{"prompt": "x", "messages": []}', 'needs exactly one of "messages" and "prompt"'),
        (MESSAGES % "[]", '"messages" must be a non-empty list'),
        (MESSAGES % '"hi"', '"messages" must be a non-empty list'),
        (MESSAGES % '[{"role": "human", "content": "x"}]', "a message must be .*got .*human"),
        (MESSAGES % '[{"role": "user"}]', "a message must be"),
        (MESSAGES % '[{"role": "user", "content": 3}]', "a message must be"),
        (MESSAGES % '[{"role": "user", "content": "x", "name": "y"}]', "a message must be"),
        (
            MESSAGES % '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]',
            "the last message must not be the assistant's",
        ),
        ('{"prompt": 3}', "a message must be"),
        ('{"prompt": " \\n "}', "every message is blank"),
        ('{"prompt": "x", "prompt_id": 7}', '"prompt_id" must be non-empty text, got 7'),
        ('{"prompt": "x", "prompt_id": ""}', "\"prompt_id\" must be non-empty text, got ''"),
        ('{"prompt": "x", "response": ["y"]}', '"response" must be non-empty text'),
        ('{"prompt": "x", "response": ""}', '"response" must be non-empty text'),
        ('{"prompt": "x", "chosen": "y"}', '"chosen" and "rejected" come together'),
        ('{"prompt": "x", "chosen": "y", "rejected": ""}', '"rejected" must be non-empty text'),
        ('{"prompt": "x", "source": false}', '"source" must be non-empty text'),
        ('{"prompt": "x", "checks": {"name": "y"}}', '"checks" must be a list of objects with a "name"'),
        ('{"prompt": "x", "checks": ["y"]}', '"checks" must be a list of objects with a "name"'),
        ('{"prompt": "x", "checks": [{"value": 3}]}', '"checks" must be a list of objects with a "name"'),
        ('{"prompt_id": "a", "prompt": "x"}', "the prompt_id 'a' was already used in line 1; ids must be unique"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, line, message):
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl line 2:? .*{message}"):
        load(tmp_path, GOOD, line)


def test_escaped_characters_outside_the_basic_plane_are_text(tmp_path):
    assert text_of(load(tmp_path, r'{"prompt": "\ud83e\udd8a"}')[0]) == "\U0001f98a"


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    # U+2028 inside a text and blank lines must not move the number.
    with pytest.raises(ConfigError, match="line 4 is not valid JSON"):
        load(tmp_path, '{"prompt": "one\u2028two"}', "", GOOD, "{")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="empty: at least one JSON line is needed"):
        load(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*none\.jsonl: No such file"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_prompts(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.jsonl is not UTF-8 text .* at byte 12"):
        load_prompts(tmp_path / "latin.jsonl")


# --- the line of a row


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Name a fruit."},
        {"prompt_id": "a", "prompt": "Name a fruit.", "source": "mine", "checks": [{"name": "max_words", "value": 3}]},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🦊"}],
            "response": "x",
        },
        {"prompt": "p", "chosen": "good", "rejected": "bad", "response": "true"},
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "p", "completion": "bad", "label": False},
    ],
)
def test_a_row_is_read_again_from_its_line(tmp_path, line):
    [row] = load(tmp_path, json.dumps(line))
    assert json.loads(own_line(row)) == line
    assert load(tmp_path, own_line(row)) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "completion": "y", "label": 1}', '"label" must be true or false, got 1'),
        ('{"prompt": "x", "completion": "y"}', '"label" must be true or false, got None'),
        ('{"prompt": "x", "label": true}', '"chosen" must be non-empty text'),
        ('{"prompt": "x", "response": " "}', '"response" must be non-empty text'),
        ('{"prompt": "x", "chosen": "y", "rejected": "y"}', '"chosen" and "rejected" are identical'),
    ],
)
def test_what_is_wrong_with_the_answers_of_a_line(tmp_path, line, message):
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl line 2: {message}"):
        load(tmp_path, GOOD, line)
