"""Parquet shards: rows fit the contract or are named, a shard exists whole or not at all, a damaged one is made again.

Strategy: rows of the smallest schema with a per-token column; crashes are an exception in the middle of writing.
"""

import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_contracts.shard_rows
import data_contracts.shards
from data_contracts.errors import ArtifactError, ContractError
from data_contracts.identity import digest_file
from data_contracts.shard_rows import RowsByPrompt, ShardRows, prompt_hashes
from data_contracts.shards import (
    SCHEMAS,
    count_rows,
    read_shard,
    read_shards,
    seal_path,
    shard_is_whole,
    shard_parts,
    shard_path,
    to_table,
    write_shard,
)  # fmt: skip


def row(number: int = 0, **changes):
    plain = {
        "prompt_id": f"p{number}", "candidate": 0, "prompt_ids": [1, 2], "token_ids": [3, 4, 5], "token_logps": [-0.5, -1.0, -0.25],
        "finish_reason": "stop", "seed": 2**61, "completion": "three",
    }  # fmt: skip
    return plain | changes


def test_rows_come_back_as_they_were_in_shard_order(tmp_path):
    for index in (1, 0):
        write_shard(shard_path(tmp_path, index), to_table([row(10 * index), row(10 * index + 1)], "generations"))
    assert [item["prompt_id"] for item in read_shards(tmp_path, "generations").to_pylist()] == [
        "p0",
        "p1",
        "p10",
        "p11",
    ]
    assert read_shard(shard_path(tmp_path, 0), "generations").to_pylist()[0] == row(0)
    assert count_rows(tmp_path) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": ["a"]}, "generations row 2, column token_ids: "),
        ({"token_ids": [2**31]}, "generations row 2, column token_ids: "),
        ({"seed": "x"}, "generations row 2, column seed: "),
        ({"completion": 7}, "generations row 2, column completion: "),
        ({"completion": None}, "generations row 2: column completion is empty; it must hold string"),
        ({"extra": 1}, r"generations row 2: unknown \['extra'\]"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_column(changes, message):
    with pytest.raises(ContractError, match=message):
        to_table([row(0), row(1), row(2, **changes)], "generations")


def test_a_missing_column_is_named():
    short = row()
    del short["seed"]
    with pytest.raises(ContractError, match=r"generations row 0: missing \['seed'\]"):
        to_table([short], "generations")


def test_an_optional_column_may_be_empty_and_no_rows_are_a_table_too():
    key = b"0123456789abcdef"
    scores = {"prompt_id": "p", "scores": [None, 1.0], "preference_logits": None, "reasons": ["", ""]}
    assert to_table([scores], "scores")["preference_logits"].to_pylist() == [None]
    assert to_table([{"key": key, "logps": []}], "token_logps")["key"].to_pylist() == [key]
    assert to_table([], "generations").num_rows == 0
    assert to_table([], "generations").schema == SCHEMAS["generations"]


@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
def test_a_shard_interrupted_while_written_is_not_there(tmp_path, monkeypatch, step):
    def crash(*arguments, **_):
        if step == "write_table":
            arguments[1].write(b"PAR1 and then")
        raise KeyboardInterrupt

    owner = data_contracts.shards.pq if step == "write_table" else os
    monkeypatch.setattr(owner, step, crash)
    with pytest.raises(KeyboardInterrupt):
        write_shard(shard_path(tmp_path, 0), to_table([row()], "generations"))
    monkeypatch.undo()
    assert list(tmp_path.glob("part-*")) == []
    assert not shard_is_whole(shard_path(tmp_path, 0), "generations")


def test_an_interrupted_rewrite_leaves_the_old_shard(tmp_path, monkeypatch):
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([row(1)], "generations"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, to_table([row(2)], "generations"))
    assert read_shard(path, "generations")["prompt_id"].to_pylist() == ["p1"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def other_columns(path):
    pq.write_table(pa.table({"prompt_id": ["p"]}), path)


@pytest.mark.parametrize("damage", [truncate, empty, other_columns])
def test_a_damaged_shard_is_not_kept(tmp_path, damage):
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([row()], "generations"))
    assert shard_is_whole(path, "generations")
    damage(path)
    with pytest.raises((ArtifactError, ContractError), match="part-00000.parquet"):
        read_shard(path, "generations")
    assert not shard_is_whole(path, "generations")
    assert not path.exists()


def test_no_flipped_bit_is_read_as_data(tmp_path):
    draw = random.Random(0)
    rows = [row(number, token_ids=[draw.randrange(1 << 30) for _ in range(20)]) for number in range(50)]
    table, path = to_table(rows, "generations"), shard_path(tmp_path, 0)
    write_shard(path, table)
    raw = path.read_bytes()
    for _ in range(100):
        broken = bytearray(raw)
        broken[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        # A bit that no reader looks at may stay; shard_is_whole removes the others.
        assert not shard_is_whole(path, "generations") or read_shard(path, "generations").equals(table)


def test_a_directory_without_shards_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="holds no part-"):
        read_shards(tmp_path, "generations")


def test_only_the_shards_that_no_earlier_try_finished_are_made_again(tmp_path):
    from stages.job import Job
    from stages.stage import STAGES

    def run(size: int = 2) -> list[int]:
        job = Job(STAGES["sample"], None, {}, tmp_path)
        made = []
        for index, items in job.missing_shards(list(range(7)), size, "generations"):
            job.write(index, [row(number) for number in items])
            made.append(index)
        return made

    assert run() == [0, 1, 2, 3]
    assert run() == []
    truncate(shard_path(tmp_path, 2))
    shard_path(tmp_path, 3).unlink()
    assert run() == [2, 3]
    assert [item["prompt_id"] for item in read_shards(tmp_path, "generations").to_pylist()] == [
        f"p{number}" for number in range(7)
    ]
    # Shards of another size hold other rows: none can be kept, nor what lies beside them.
    write_shard(shard_path(tmp_path, 3, "dropped"), to_table([], "dropped"))
    assert run(3) == [0, 1, 2]
    assert count_rows(tmp_path) == 7
    assert list(tmp_path.glob("dropped-*")) == []


def test_a_large_shard_is_read_in_parts_and_as_strictly(tmp_path, monkeypatch):
    monkeypatch.setattr(data_contracts.shards, "LARGE_SHARD_BYTES", 0)
    monkeypatch.setattr(data_contracts.shards, "ROWS_PER_PART", 2)
    path = shard_path(tmp_path, 0)
    table = to_table([row(number) for number in range(5)], "generations")
    write_shard(path, table)
    parts = list(shard_parts(path, "generations"))
    assert [len(part) for part in parts] == [2, 2, 1] and pa.concat_tables(parts).equals(table)
    assert list(ShardRows([tmp_path], "generations")) == table.to_pylist()
    with pytest.raises(ContractError, match="do not fit the contract of dropped"):
        list(shard_parts(path, "dropped"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="its content is not what was written"):
        list(shard_parts(path, "generations"))


@pytest.mark.parametrize("joined_bytes", [0, 2**27])
def test_rows_of_several_shards_are_those_of_the_table(tmp_path, monkeypatch, joined_bytes):
    """As many tables as shards, in a mapped file, or one in memory."""
    monkeypatch.setattr(data_contracts.shard_rows, "JOINED_BYTES", joined_bytes)
    monkeypatch.setattr(data_contracts.shard_rows, "RESIDENT_ROWS", 3)
    rows = [{"prompt_id": f"p{number}", "reason": "r"} for number in range(10)]
    for index, part in enumerate((rows[:4], rows[4:5], rows[5:])):
        write_shard(shard_path(tmp_path / "a", index), to_table(part, "dropped"))
    write_shard(shard_path(tmp_path / "b", 0), to_table(rows[:2], "dropped"))
    joined, expected = ShardRows([tmp_path / "a", tmp_path / "b"], "dropped"), rows + rows[:2]
    assert (
        len(joined) == 12
        and list(joined) == expected
        and [joined[i] for i in (0, 4, 11)] == [expected[i] for i in (0, 4, 11)]
    )
    assert all(joined[a:b] == expected[a:b] for a in range(13) for b in range(14))
    assert joined.pick([11, 0, 5, 0]) == [expected[i] for i in (11, 0, 5, 0)] and joined.pick([]) == []
    with pytest.raises(IndexError):
        joined[12]
    lists = [row(number) for number in range(5)]
    for index in range(5):
        write_shard(shard_path(tmp_path / "c", index), to_table(lists[index : index + 1], "generations"))
    assert list(ShardRows([tmp_path / "c"], "generations")) == read_shards(tmp_path / "c", "generations").to_pylist()


def test_rows_are_found_by_their_prompt(tmp_path, monkeypatch):
    """In any order, several of one prompt or none; a hash that two ids share does not join them."""
    ids = ["b", "a", "b", "c", "b"]
    rows = [{"prompt_id": name, "reason": str(number)} for number, name in enumerate(ids)]
    for index in range(5):
        write_shard(shard_path(tmp_path, index), to_table(rows[index : index + 1], "dropped"))
    expected = [[rows[3]], [], [rows[0], rows[2], rows[4]], [rows[1]]]
    hashed = ShardRows([tmp_path], "dropped")
    found = RowsByPrompt(hashed)
    assert found.pick(["c", "x", "b", "a"]) == expected and found.pick([]) == []
    hashes = prompt_hashes(hashed)
    assert found.counts(hashes).tolist() == [3, 1, 3, 1, 3]
    assert found.first_of_others(hashes) is None and found.first_of_others(hashes[:1]) == rows[1]
    monkeypatch.setattr(data_contracts.shard_rows, "hash", lambda _: 7, raising=False)
    assert RowsByPrompt(hashed).pick(["c", "x", "b", "a"]) == expected


def test_every_single_flipped_bit_of_a_shard_is_found(tmp_path):
    """Also those in page headers and the footer, which Parquet's checksums leave out."""
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([row(number) for number in range(4)], "generations"))
    good = path.read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ArtifactError, match="cannot be read as Parquet"):
            read_shard(path, "generations")
    path.write_bytes(good)
    assert shard_is_whole(path, "generations")


@pytest.mark.parametrize("seal", [None, "", "0" * 12, "x" * 9999])
def test_a_shard_without_its_seal_is_read_by_parquets_own_checksums(tmp_path, seal):
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([row()], "generations"))
    seal_path(path).unlink()
    if seal is not None:
        seal_path(path).write_text(seal)
    assert read_shard(path, "generations").num_rows == 1
    assert shard_is_whole(path, "generations")  # asked by the stage that goes on: it seals the shard
    assert seal_path(path).read_text() == digest_file(path)


def test_a_shard_that_was_replaced_without_a_new_seal_is_made_again(tmp_path):
    path = shard_path(tmp_path, 0)
    write_shard(path, to_table([row()], "generations"))
    seal_path(path).write_text("0" * 64)
    assert not shard_is_whole(path, "generations") and not path.exists()
    write_shard(path, to_table([row()], "generations"))
    assert shard_is_whole(path, "generations")
