"""Prompt files of our own format: whatever is wrong with a line is said with its number.

Strategy: every error has one bad line behind one good one, so the number 2 must be in the sentence.
"""

import json
import re

import pytest

from data_contracts.errors import ConfigError
from data_contracts.prompts import UnusableRow, own_line, prompt_row, text_of
from tasks.data.reading import read_source
from tasks.data.source import Source

GOOD = '{"prompt_id": "a", "prompt": "Name a fruit."}'


def read(tmp_path, *lines: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_source(Source(path=str(path)))


def load(tmp_path, *lines: str):
    return list(read(tmp_path, *lines).prompts)


def sentence_on_second_line(tmp_path, line: str) -> str:
    """What is said of a line that cannot be used."""
    reading = read(tmp_path, GOOD, line)
    assert [row["prompt_id"] for row in reading.prompts] == ["a"]
    [[sentence]] = reading.drops.examples.values()
    return sentence


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


def test_the_same_text_twice_without_ids_is_a_repetition(tmp_path):
    reading = read(tmp_path, '{"prompt": "one"}', '{"prompt": "one"}')
    assert len(reading.prompts) == 1
    assert dict(reading.drops.places) == {"an exact repetition of an earlier row": ["line 2"]}


MESSAGES = '{"messages": %s}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r"is not valid JSON: Expecting ',' delimiter at column 15"),
        (r'{"prompt": "\ud83e"}', "holds half of a surrogate pair"),
        ("prompt: x", "is not valid JSON: Expecting value at column 1"),
        ('["x"]', "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('{"prompt_id": "b"}', "no column holds a prompt"),
        (MESSAGES % "[]", '"messages" must be a non-empty list'),
        (MESSAGES % '"hi"', '"messages" must be a non-empty list'),
        (MESSAGES % '[{"role": "tool", "content": "x"}]', "is by 'tool', not by one of system, user, assistant"),
        (MESSAGES % '[{"role": "user"}]', "every message is blank"),
        (MESSAGES % '[{"role": "user", "content": 3}]', r'"messages\[\].content" must be text, got 3'),
        ('{"prompt": 3}', '"prompt" must be text, got 3'),
        ('{"prompt": " \\n "}', "every message is blank"),
        ('{"prompt": "x", "prompt_id": 7.5}', '"prompt_id" must be non-empty text, got 7.5'),
        ('{"prompt": "x", "response": ["y"]}', "a turn of \"response\" must be a message, got 'y'"),
        ('{"prompt": "x", "response": ""}', '"response" must be non-empty text'),
        ('{"prompt": "x", "response": " "}', '"response" must be non-empty text'),
        ('{"prompt": "x", "chosen": "y"}', '"rejected" must be non-empty text'),
        ('{"prompt": "x", "chosen": "y", "rejected": ""}', '"rejected" must be non-empty text'),
        ('{"prompt": "x", "chosen": "y", "rejected": "y"}', '"chosen" and "rejected" are identical'),
        ('{"prompt": "x", "completion": "y", "label": "good"}', "\"label\" must be true or false, got 'good'"),
        ('{"prompt": "x", "completion": "", "label": true}', '"chosen" must be non-empty text'),
        ('{"prompt": "x", "checks": {"name": "y"}}', '"checks" must be a list of objects with a "name"'),
        ('{"prompt": "x", "checks": ["y"]}', '"checks" must be a list of objects with a "name"'),
        ('{"prompt": "x", "checks": [{"value": 3}]}', '"checks" must be a list of objects with a "name"'),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, line, message):
    assert re.search(rf"prompts\.jsonl line 2:? .*{message}", sentence_on_second_line(tmp_path, line))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [{"role": "human", "content": "x"}]}, "a message must be .*got .*human"),
        ({"messages": [{"role": "user"}]}, "a message must be"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "a message must be"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
         "the last message must not be the assistant's"),
        ({"prompt_id": 7}, '"prompt_id" must be non-empty text, got 7'),
        ({"prompt_id": ""}, '"prompt_id" must be non-empty text'),
        ({"source": False}, '"source" must be non-empty text'),
    ],
)  # fmt: skip
def test_a_row_that_breaks_the_contract_is_refused(values, message):
    with pytest.raises(UnusableRow, match=message):
        prompt_row(**{"messages": [{"role": "user", "content": "x"}]} | values)


def test_an_id_that_another_prompt_has_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prompts\.jsonl line 2: the prompt_id 'a' was already used in line 1.*unique"
    ):
        load(tmp_path, GOOD, '{"prompt_id": "a", "prompt": "x"}')


def test_a_field_that_no_line_of_ours_has_is_not_read_and_that_is_said(tmp_path):
    reading = read(tmp_path, GOOD, '{"prompt": "x", "promptid": "b"}')
    assert len(reading.prompts) == 2 and reading.notes == ["columns that are not read: promptid"]


def test_escaped_characters_outside_the_basic_plane_are_text(tmp_path):
    assert text_of(load(tmp_path, r'{"prompt": "\ud83e\udd8a"}')[0]) == "\U0001f98a"


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    # U+2028 inside a text and blank lines must not move the number.
    reading = read(tmp_path, '{"prompt": "one\u2028two"}', "", GOOD, "{")
    assert dict(reading.drops.places) == {"the line is not valid JSON": ["line 4"]}


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="empty: at least one row is needed"):
        load(tmp_path, text)


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
