"""`selfplay data`: what would be read of a source, rows as the policy's tokens say, and a file of our own format.

Strategy: the command as it is typed, in this process, on small files and the tiny model's tokenizer.
"""

import json
import re

import pytest

from flows.cli.commands import main as selfplay
from tasks.data.reading import read_source
from tasks.data.source import Source

ROWS = [
    {"question": f"What is {number} times {number}, and why <|end|>?", "good": str(number**2), "bad": "0", "score": 1}
    for number in range(1, 41)
]
COLUMNS = ["--column", "prompt=question", "--column", "chosen=good", "--column", "rejected=bad"]


@pytest.fixture
def data(tmp_path, capsys):
    """data(rows, words ...) -> (exit code, output lines) of `selfplay data` on a file of these rows."""

    def run(rows, *words: str):
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        code = selfplay(["data", str(path), *words])
        captured = capsys.readouterr()
        return code, (captured.out + captured.err).splitlines()

    return run


def test_what_would_be_read_is_said_with_counts_columns_and_drops(data):
    code, lines = data([*ROWS, ROWS[0], ROWS[1] | {"good": " "}], *COLUMNS)
    assert code == 0
    assert lines[0].endswith("mine.jsonl: 42 rows, read as prompts from the columns question, good, bad")
    assert lines[1] == "columns that are not read: score"
    assert lines[2:4] == ["40 rows can be used: 40 pairs", "2 rows are dropped:"]
    assert "  1  `chosen` is empty or blank: line 42" in lines
    assert "  1  an exact repetition of an earlier row: line 41" in lines


def test_rows_are_shown_as_the_policys_tokens_say(data, tiny_model):
    """What the template writes is in brackets, the same text out of data is not; the answer and its end are marked."""
    code, lines = data(ROWS, *COLUMNS, "--policy", str(tiny_model))
    assert code == 0
    first = lines.index("--- line 1")
    question = "What is 1 times 1, and why <|end|>?"
    assert lines[first + 1] == f"[<|user|>]{question}[<|end|>][<|assistant|>]"
    assert lines[first + 2].startswith(">>>1[<|end|>]<<<   (chosen: ")
    assert lines[first + 3].startswith(">>>0[<|end|>]<<<   (rejected: ")
    assert sum(line.startswith("--- line") for line in lines) == 3
    assert {line.split(":")[0] for line in lines if "tokens: median" in line} == {
        f"{name} tokens" for name in ("prompt", "chosen", "rejected")
    }
    assert sum(int(line.split()[3]) for line in lines if re.fullmatch(r" +\d+ to \d+ +\d+( +#+)?", line)) == 3 * 40
    assert lines[-1] == "0 of 40 prompts that were counted have more than 512 tokens"


def test_near_duplicates_of_held_out_prompts_are_counted(data, tmp_path):
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"prompt": ROWS[3]["question"]}))
    code, lines = data(ROWS, *COLUMNS, "--heldout", str(tmp_path / "heldout.jsonl"))
    [line] = [line for line in lines if "nearly one of 1 held-out prompts" in line]
    assert code == 0 and int(line.split()[0]) >= 1


def test_what_is_read_can_be_written_in_our_own_format_and_read_again(data, tmp_path):
    out = tmp_path / "ours.jsonl"
    code, lines = data(ROWS, *COLUMNS, "--out", str(out))
    assert code == 0 and lines[-1] == f"40 rows are in {out}"
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    expected = read_source(Source(path=str(tmp_path / "mine.jsonl"), columns=columns)).prompts
    assert list(read_source(Source(path=str(out))).prompts) == list(expected)
    code, lines = data(ROWS, *COLUMNS, "--out", str(out))
    assert code == 2 and "is there already: name another file with --out" in lines[-1]


def test_a_source_that_cannot_be_read_is_one_sentence(data):
    code, lines = data(ROWS, "--column", "prompt=text")
    assert code == 2 and len(lines) == 1 and "has no column 'text' (columns.prompt); it has question, good" in lines[0]


@pytest.mark.parametrize("command", ["data", "init"])
def test_a_model_that_is_nowhere_is_one_sentence(command, data, tmp_path, capsys):
    data([{"prompt": "1?", "response": "yes"}])
    source = str(tmp_path / "mine.jsonl")
    words = {"data": ["data", source], "init": ["init", "sft", "--data", source, "--out", "-"]}[command]
    assert selfplay([*words, "--policy", "../no/such/model"]) == 2
    assert "neither a directory (" in (error := capsys.readouterr().err) and "Traceback" not in error


def test_rows_without_an_answer_among_others_are_named(data):
    rows = [{"prompt": f"{number}?", "response": "yes" if number else None} for number in range(3)]
    assert "3 rows can be used: 2 with a response; 1 without an answer (line 1)" in data(rows)[1]


def test_checks_that_a_run_would_refuse_are_named_by_line(data):
    rows = [
        {"prompt": "Say yes.", "checks": [{"name": "max_words", "value": 3}]},
        {"prompt": "Say no.", "checks": [{"name": "max_wordss", "value": 3}]},
        {"prompt": "Say it briefly.", "checks": [{"name": "max_words", "value": "six"}]},
    ]
    code, lines = data(rows)
    assert code == 0
    start = lines.index("2 rows with checks that the scorer `checks` refuses, and with them the run:")
    assert lines[start + 1].startswith("  line 2: ") and "max_words" in lines[start + 1].split("wordss", 1)[1]
    assert lines[start + 2].startswith("  line 3: Check 'max_words' wants ") and lines[start + 2].endswith("got 'six'.")
