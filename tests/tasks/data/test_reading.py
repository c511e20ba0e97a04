"""Reading a source: formats, columns that are named, limits, and whatever can be wrong with a file is said in one
sentence.

Strategy: each input is written by the test; what is wrong stands behind a good row, so its number must be in the
message.
"""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_contracts.errors import ConfigError, PipelineError
from data_contracts.identity import canonical_json, digest_text
from data_contracts.prompts import own_line, prompt_row
from data_contracts.shards import SCHEMAS, to_table
from tasks.data import text_files
from tasks.data.reading import read_source
from tasks.data.source import Source

GOOD = {"prompt": "Name a fruit.", "response": "Pear."}


@pytest.fixture
def read(tmp_path):
    """read(content, name, ...) -> Reading of a file that holds the content: bytes, a text, or rows as JSON lines."""

    def reading(content, name: str = "data.jsonl", **source):
        if isinstance(content, list):
            content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content) + "\n"
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_source(Source(path=str(path), **source))

    return reading


def prompts_of(reading) -> list[str]:
    return [row["messages"][-1]["content"] for row in reading.prompts]


# --- our own format


def test_a_file_of_our_own_format_gives_its_rows(read):
    checks, brief = [{"value": 3, "name": "max_words"}], {"role": "system", "content": "Be brief."}
    greeting = {"content": "Hi 🦊", "role": "user"}
    lines = [
        {"prompt_id": "a", "prompt": "Name a fruit.", "checks": checks, "source": "mine"},
        {"messages": [brief, greeting], "response": "Hello."},
        {"prompt": "Name a bird.", "chosen": "Robin.", "rejected": "A bird.", "response": None},
        {"prompt": "Name a fish.", "completion": "Trout.", "label": True},
    ]
    expected = [
        prompt_row([{"role": "user", "content": "Name a fruit."}], prompt_id="a", checks=checks, source="mine"),
        prompt_row([brief, greeting], response="Hello."),
        prompt_row([{"role": "user", "content": "Name a bird."}], chosen="Robin.", rejected="A bird."),
        prompt_row([{"role": "user", "content": "Name a fish."}], chosen="Trout."),
    ]
    reading = read(lines)
    assert list(reading.prompts) == expected and not reading.drops.counts and not reading.notes
    assert reading.prompts.digest == digest_text(canonical_json(expected))
    assert reading.prompts.table().equals(to_table(expected, "prompts"))


@pytest.mark.parametrize("name", ["quickstart_train", "quickstart_heldout", "tiny"])
def test_nothing_of_the_prompt_files_of_this_checkout_is_lost(name):
    path = f"deploy/prompts/{name}.jsonl"
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        if line.get("messages", []) and len(line["messages"]) == 1:  # how a line says it shorter
            line["prompt"] = line.pop("messages")[0]["content"]
    assert [json.loads(own_line(row)) for row in read_source(Source(path=path)).prompts] == lines


def test_an_artifact_of_prompts_can_be_read_as_a_source(read, tmp_path):
    rows = list(read([{"prompt": "a", "checks": [{"name": "x"}]}, {"prompt": "b", "response": "c"}]).prompts)
    pq.write_table(to_table(rows, "prompts"), tmp_path / "part-00000.parquet")
    assert list(read_source(Source(path=str(tmp_path / "part-00000.parquet"))).prompts) == rows


# --- formats

ROWS = [
    {"prompt": f'Question {number}, "quoted"\nin two lines?', "response": f"Answer {number}."} for number in range(5)
]


def csv_text(separator: str) -> str:
    quoted = [f'"{row["prompt"].replace(chr(34), chr(34) * 2)}"{separator}{row["response"]}' for row in ROWS]
    return f"prompt{separator}response\n" + "\n".join(quoted) + "\n"


def ipc(stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def pa_compress(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=4).encode()),
        ("a.csv", csv_text(",").encode()),
        ("a.csv", csv_text(";").encode("utf-8-sig")),
        ("a.csv", csv_text(", ").encode()),
        ("a.tsv", csv_text("\t").encode()),
        ("a.parquet", parquet()),
        ("a.data", parquet()),
        ("a.arrow", ipc(True)),
        ("a.arrow", ipc(False)),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.csv.xz", lzma.compress(csv_text(",").encode())),
        ("a.jsonl.zst", pa_compress(LINES)),
        ("a.json", json.dumps({"data": ROWS}).encode()),
        ("a.json", json.dumps({"version": "1.0", "rows": ROWS, "info": {"count": 2}}, indent=1).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
    ],
)
def test_formats(read, name, content):
    reading = read(content, name)
    assert [(row["messages"][0]["content"], row["response"]) for row in reading.prompts] == [
        (row["prompt"], row["response"]) for row in ROWS
    ]
    assert not reading.drops.counts


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
def test_a_json_array_is_read_item_by_item_wherever_a_chunk_ends(read, monkeypatch, chunk):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    rows = [{"prompt": f"Wie heißt {number}? 🦊 [{{", "response": '\\" é'} for number in range(30)]
    assert prompts_of(read(json.dumps(rows, ensure_ascii=False, indent=1), "a.json")) == [row["prompt"] for row in rows]


@pytest.mark.parametrize("chunk", [7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_an_object_are_read_item_by_item_wherever_a_chunk_ends(read, monkeypatch, chunk, indent):
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    rows = [{"prompt": f"{number}: ä [{{", "response": "}]"} for number in range(40)]
    whole = {"name": "mine", "n": [1, 2, {"a": "]"}], "rows": rows, "more": {"deep": [[{"b": "}"}]]}}
    reading = read(json.dumps(whole, indent=indent), "a.json")
    assert [row["messages"][0]["content"] for row in reading.prompts] == [row["prompt"] for row in rows]
    assert [reading.prompts.where(number) for number in (0, 39)] == ["line 1", "line 40"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"id": 7, "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"instruction": "Why?", "completions": [{"response": "a"}, {"response": "b"}], "output": "So."},
        {"prompt": "Why?", "response": "So.", "facts": [{"a": 1}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_object_that_is_a_row_is_that_row(read, row, indent):
    (prompt,) = read(json.dumps(row, indent=indent), "a.json").prompts
    assert (prompt["messages"][0]["content"], prompt["response"]) == ("Why?", "So.")


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b'{"prompt": "cut', "the line is not valid JSON"),
        (b'{"prompt": "cut"', "the line is not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "the text cannot be decoded"),
    ],
)
def test_lines_of_json_of_which_the_first_is_broken_stay_lines(read, first, reason):
    reading = read(b"\n".join([first, b'{"prompt": "1?"}', b"{", b'{"prompt": "2?"}', b""]))
    assert reading.drops.counts[reason] >= 1 and sum(reading.drops.counts.values()) == 2
    assert [reading.prompts.where(number) for number in range(2)] == ["line 2", "line 4"]


def test_shards_are_one_source_and_places_name_the_file(read, tmp_path):
    for number in range(3):
        lines = [{"prompt": f"{number}a"}, {"prompt": ""} if number == 1 else {"prompt": f"{number}b"}]
        read(lines, f"shards/part-{number}.jsonl")
    reading = read_source(Source(path=str(tmp_path / "shards" / "part-*.jsonl")))
    assert prompts_of(reading) == ["0a", "0b", "1a", "2a", "2b"]
    assert reading.prompts.where(4) == f"{tmp_path}/shards/part-2.jsonl line 2"
    assert reading.drops.places["the prompt is empty or blank"] == [f"{tmp_path}/shards/part-1.jsonl line 2"]


def test_a_directory_has_the_splits_that_its_files_are_named_for(tmp_path):
    for split, first in (("train", 0), ("test", 4)):
        for shard in range(2):
            table = pa.table({"prompt": [f"prompt {first + shard}"]})
            path = tmp_path / "data" / f"{split}-0000{shard}-of-00002.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table, path)
    reading = read_source(Source(path=str(tmp_path)))
    assert prompts_of(reading) == ["prompt 0", "prompt 1"] and "not read: test" in reading.notes[0]
    assert prompts_of(read_source(Source(path=str(tmp_path), split="test"))) == ["prompt 4", "prompt 5"]
    (tmp_path / "data" / "more.csv").write_text("prompt\nc\n")  # the library reads files of one format
    assert read_source(Source(path=str(tmp_path))).notes[1] == f"{tmp_path}: not read: data/more.csv"


# --- columns, limits, ids


def test_columns_that_are_named_are_the_only_ones_that_are_read(read):
    rows = [{"question": "Q?", "answer": "A.", "prompt": "another", "messages": 3}]
    reading = read(rows, columns={"prompt": "question", "response": "answer"})
    assert [(row["messages"][0]["content"], row["response"]) for row in reading.prompts] == [("Q?", "A.")]
    assert (reading.used, reading.ignored) == (["question", "answer"], ["prompt", "messages"])


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(read, name):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([GOOD]), sink)
    content = sink.getvalue().to_pybytes() if name.endswith("parquet") else [GOOD]
    with pytest.raises(ConfigError, match=r"has no column 'answer' \(columns.response\); it has prompt, response"):
        read(content, name, columns={"prompt": "prompt", "response": "answer"})


def test_a_limit_draws_by_seed_keeps_the_order_and_does_not_depend_on_repetitions(read, tmp_path):
    rows = [{"prompt": f"Question {number}?"} for number in range(2000)]
    drawn = read(rows, limit=100)
    numbers = [int(text.split()[1][:-1]) for text in prompts_of(drawn)]
    assert len(numbers) == 100 and numbers == sorted(numbers) and 700 < np.mean(numbers) < 1300
    assert list(read(rows + rows[:500], limit=100).prompts) == list(drawn.prompts)
    other = read_source(Source(path=str(tmp_path / "data.jsonl"), limit=100), seed=1)
    assert len(set(prompts_of(other)) - set(prompts_of(drawn))) > 80
    assert read(rows, limit=5000).prompts.digest == read(rows).prompts.digest


def test_a_limit_lets_go_of_rows_while_it_reads(read, monkeypatch):
    monkeypatch.setattr("tasks.data.collector.BATCH", 10)
    rows = [{"prompt": f"Question {number}?"} for number in range(3000)]
    drawn = read(rows, limit=50)
    monkeypatch.setattr("tasks.data.collector.BATCH", 1000)
    assert list(drawn.prompts) == list(read(rows, limit=50).prompts)
    assert [drawn.prompts.where(index) for index in range(50)] == [
        f"line {int(text.split()[1][:-1]) + 1}" for text in prompts_of(drawn)
    ]


def test_a_label_that_is_a_class_of_something_is_not_read_and_that_is_said(read):
    rows = [{"prompt": f"q{number}", "response": "a", "label": number} for number in range(2)]
    reading = read(rows)
    assert reading.used == ["prompt", "response"] and reading.notes == ["columns that are not read: label"]
    assert read([row | {"label": str(row["label"] > 0)} for row in rows]).used == ["prompt", "response", "label"]


def test_several_pairs_of_one_prompt_get_ids_of_their_own(read):
    reading = read([{"prompt": "p", "chosen": str(number), "rejected": "x"} for number in range(3)])
    ids = [row["prompt_id"] for row in reading.prompts]
    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"] and not reading.notes


def test_an_id_that_somebody_wrote_twice_is_numbered_and_that_is_said(read):
    rows = (("a", "x", "1"), ("a-2", "y", "2"), ("a", "x", "3"))
    reading = read([{"prompt_id": name, "prompt": text, "response": answer} for name, text, answer in rows])
    assert [row["prompt_id"] for row in reading.prompts] == ["a", "a-2", "a-3"]
    assert reading.notes == ["1 rows have the prompt_id of an earlier row: they are numbered (id-2, id-3 ...)"]


def test_an_id_of_two_different_prompts_is_refused(read):
    with pytest.raises(ConfigError) as refused:
        read([{"prompt_id": name, "prompt": text} for name, text in (("a", "x"), ("b", "y"), ("a", "z"), ("b", "u"))])
    assert str(refused.value).startswith(
        "data.jsonl line 3: the prompt_id 'a' was already used in line 1, for another prompt (2 such rows): ids must be"
    )


# --- rows that cannot be used


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": "x"', "the line is not valid JSON"),
        ("[" * 100_000, "the line is nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + "}", "the line is not valid JSON"),
        ('["x"]', "the line is not a JSON object"),
        (r'{"prompt": "\ud83e"}', "the text cannot be decoded"),
        ({"text": "x"}, "no column holds a prompt"),
        ({"prompt": 3}, "`prompt` is not text"),
        ({"prompt": " \n "}, "the prompt is empty or blank"),
        ({"prompt": "x", "response": " "}, "`response` is empty or blank"),
        ({"prompt": "x", "chosen": "y", "rejected": "\t"}, "`rejected` is empty or blank"),
        ({"prompt": "x", "chosen": "y"}, "`rejected` is empty or blank"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "`chosen` and `rejected` are identical"),
        ({"prompt": "x", "completion": "y", "label": "good"}, "`label` is neither true nor false"),
        ({"prompt": "x", "completion": "", "label": True}, "`chosen` is empty or blank"),
        ({"messages": []}, "`messages` is no conversation"),
        ({"messages": "hi"}, "`messages` is no conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a turn of `messages` is not by system, user or assistant"),
        ({"messages": [{"role": "user"}]}, "the prompt is empty or blank"),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages[].content` is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
         "a turn of `messages` holds something that is not text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "a turn of `messages` calls tools"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the prompt is empty or blank"),
        ({"prompt": "x", "prompt_id": ["y"]}, "`prompt_id` is not text"),
        ({"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "user", "content": "x"}], "rejected": "z"},
         "`chosen` does not end with the assistant's turn"),
        ({"prompt": "x", "chosen": [{"from": "user", "value": "y"}, {"from": "gpt", "value": "z"}], "rejected": "z"},
         "`chosen` begins with another prompt than the row's"),
        ({"prompt": "x", "checks": [3]}, "`checks` is not a list of objects with a name"),
        ({"prompt": "Name a fruit.", "response": "Pear."}, "an exact repetition of an earlier row"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason_and_its_line(read, row, reason):
    reading = read([GOOD, "", row])
    assert prompts_of(reading) == ["Name a fruit."]
    assert dict(reading.drops.places) == {reason: ["line 3"]} and reading.rows == 2


def test_bytes_that_are_no_utf8_spoil_their_row_only(read):
    reading = read(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert dict(reading.drops.places) == {"the text cannot be decoded": ["line 2"]}


def test_text_of_a_table_that_cannot_be_decoded_spoils_its_row_only(read, tmp_path):
    texts = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9"))
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    reading = read_source(Source(path=str(tmp_path / "a.parquet")))
    assert prompts_of(reading) == ["a"] and dict(reading.drops.places) == {"the text cannot be decoded": ["row 2"]}


def test_a_line_of_a_spreadsheet_with_a_cell_too_many(read):
    reading = read("prompt,response\na,b\nc,d,e\nf,\n", "a.csv")
    assert dict(reading.drops.places) == {
        "the line has more or fewer cells than the first one": ["line 3"],
        "`response` is empty or blank": ["line 4"],
    }


def test_all_problems_are_said_at_once_with_counts_and_three_examples(read):
    rows = [{"prompt": f"p{number}", "chosen": "a", "rejected": "a" if number % 2 else ""} for number in range(40)]
    reading = read([*rows, {"prompt": "good", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ConfigError) as refused:
        reading.drops.check("data.jsonl", reading.rows, 0.5)
    lines = str(refused.value).splitlines()
    assert lines[0] == "data.jsonl: 40 of 41 rows cannot be used (limit: 50%, prompts.max_drop_rate)"
    assert lines[1].startswith("  20  `rejected` is empty or blank: line 1, line 3, line 5,") and lines[1].endswith(
        "and 12 more"
    )
    assert lines[2] == (
        "       data.jsonl line 1: \"rejected\" must be non-empty text, got '' "
        "(prompt: 'p0', chosen: 'a', rejected: '')"
    )
    assert len(lines) == 10
    assert lines[5].startswith("  20  `chosen` and `rejected` are identical")
    reading.drops.check("data.jsonl", reading.rows, 0.98)
    with pytest.raises(ConfigError, match="1 of 2 rows"):
        read([GOOD, "{"]).drops.check("data.jsonl", 2, 0.5)  # the limit itself stops
    read([GOOD]).drops.check("data.jsonl", 1, 0.0)


# --- files that cannot be used


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.jsonl", "a.jsonl is empty: at least one row is needed"),
        (b"\n \n", "a.jsonl", "a.jsonl is empty"),
        (b"[]", "a.json", "a.json is empty"),
        (b"", "a.parquet", "a.parquet is empty"),
        (b"prompt,response\n", "a.csv", "a.csv is empty"),
        (b"\x7fELF\0\0\0", "a.jsonl", "a.jsonl is not text: it holds zero bytes"),
        ('{"prompt": "x"}'.encode("utf-16"), "a.jsonl", "a.jsonl is text in UTF-16, and UTF-8 is read: iconv -f UTF-16"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "a.jsonl", "a.jsonl is not text: it holds zero bytes"),
        (b'{"train": [{"prompt": "x"}], "test": [{"prompt": "y"}]}', "a.json",
         "a.json is one JSON object with 2 lists of rows: train, test. Give a file of its own to each"),
        (b'{"data": [{"prompt": "x"}, 3,]', "a.json", "none of its 1 rows can be used"),
        (b"no zstd", "a.jsonl.zst", "a.jsonl.zst cannot be read: "),
        (b"x", "a.xlsx", "a.xlsx: cannot tell the format from the name; known are .jsonl, .json"),
        (b"no parquet", "a.parquet", "a.parquet cannot be read as Parquet: "),
        (b"PAR1 and no more", "a.jsonl", "a.jsonl cannot be read as Parquet: "),
        (b"no arrow", "a.arrow", "a.arrow cannot be read as Arrow: "),
        (b"no gzip", "a.jsonl.gz", "a.jsonl.gz cannot be read: Not a gzipped file"),
        (gzip.compress(LINES * 99)[:-90], "a.jsonl.gz", "a.jsonl.gz cannot be read: Compressed file ended"),
        (b'[{"prompt": "x"}, {"prompt": "y"}', "a.json", "ends inside of its JSON array, after 2 items"),
        (b'[{"prompt": "x"}, {"prompt": ]', "a.json", "item 2 of the JSON array is not valid JSON: Expecting value"),
        (b'[{"prompt": "x"}]\n[{"prompt": "y"}]\n', "a.jsonl", "goes on behind the end of its JSON array, after 1 items"),
        (b'prompt,response\na,b\nc,"d\ne,f\ng,h\n', "a.csv", "a quote that opens in the row at line 3 is never closed, "
         "and takes in the 2 lines below"),
        (b"a,b,a\n1,2,3\n", "a.csv", "the first line must name the columns, each once"),
        (b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl",
         "no column holds a prompt. It has text, body; a prompt is looked for in prompt, messages"),
        (b'{"prompt": ""}\n{"prompt": " "}\n', "a.jsonl",
         "none of its 2 rows can be used\n  2  the prompt is empty or blank: line 1, line 2"),
        (b'{"prompt": "x"}\n{"conversations": []}\n', "a.jsonl",
         r"mixes shapes: line 1 is read as prompts, line 2 as conversations \(its columns: conversations\). Split it"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(read, content, name, message):
    with pytest.raises(ConfigError, match=message):
        read(content, name)


def test_a_line_without_an_end_is_refused_before_memory_is(read, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_ROW", 1000)
    for name, content in (("a.jsonl", LINES[:60] + b"\n" + b"x" * 5000), ("a.csv", b"prompt\n" + b"x" * 5000)):
        with pytest.raises(ConfigError, match="line 2 is longer than 64 MiB"):
            read(content, name)
    monkeypatch.setattr(text_files, "CHUNK", 100)
    with pytest.raises(ConfigError, match="item 1 of the JSON array is longer than"):
        read('[{"prompt": "' + "x" * 5000 + '"}]', "a.json")


def test_pipes_and_devices_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    for path in (tmp_path / "fifo.jsonl", "/dev/zero"):
        with pytest.raises(ConfigError, match="is a pipe or a device: prompts are read more than once, so give a file"):
            read_source(Source(path=str(path)))


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the prompt file .*none\.jsonl: No such file"):
        read_source(Source(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match=r"A data set of the hub is written \{hub_id: owner/name\}"):
        read_source(Source(path="owner/name"))
    with pytest.raises(ConfigError, match=r"no file matches .*\*\.jsonl"):
        read_source(Source(path=str(tmp_path / "*.jsonl")))
    with pytest.raises(ConfigError, match="is no directory of data files"):
        read_source(Source(path=str(tmp_path)))
    with pytest.raises(ConfigError, match="cannot read the prompts"):
        read_source(Source(path="a\0b"))


def test_a_file_has_no_splits(read):
    with pytest.raises(ConfigError, match="is a file and has no splits: remove `split: test`"):
        read([GOOD], split="test")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "give exactly one of `path`, `hub_id` and `mix`"),
        ({"path": "a", "hub_id": "b"}, "give exactly one of"),
        ({"path": "a", "name": "b"}, "`name` goes with `hub_id`"),
        ({"path": "a", "columns": {"promt": "b"}}, "columns.promt"),
        ({"path": "a", "columns": {"prompt": "b", "response": "b"}}, "a column of the data can be one thing only"),
        ({"mix": [{"source": "a", "weight": 0}]}, "greater than 0"),
    ],
)
def test_a_source_that_says_two_things_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        Source.model_validate(source)


# --- anything

NAMES = st.sampled_from(
    ["prompt", "messages", "conversations", "instruction", "input", "history", "system", "response", "completion",
     "label", "chosen", "rejected", "real", "generated", "checks", "source", "prompt_id", "role", "content", "from",
     "value", "type", "text"]
)  # fmt: skip
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "human",
        "gpt",
        "text",
        "x",
        "",
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nAssistant:",
        "[1]",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=14,
)


@settings(max_examples=500)
@given(rows=st.lists(st.dictionaries(NAMES, VALUES, min_size=1, max_size=5), min_size=1, max_size=3))
def test_whatever_a_row_holds_it_becomes_a_row_of_prompts_or_a_reason(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        reading = read_source(Source(path=str(path)))
    except PipelineError as error:
        assert "any.jsonl" in str(error)
    else:
        assert reading.prompts.table().schema == SCHEMAS["prompts"]
        assert len(reading.prompts) + reading.drops.counts.total() == len(rows)
        assert len({row["prompt_id"] for row in reading.prompts}) == len(reading.prompts)
