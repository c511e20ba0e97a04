"""Claims: a shard is made by one worker, or by another if that dies; a shard that fails twice is named.

Strategy: workers are forked processes whose "shards" are files; flock, the kernel's release of a dead holder's lock and
the order of the tries are the real ones. Whole stages are in test_share.py.
"""

import os
import signal
import time
from pathlib import Path

import pytest

from data_contracts.errors import StageError, TransientError
from stages.running.claims import CLAIMS, Claims, forget, history, label_of, poison, raise_poison

COUNT = 12


def work(directory: Path, worker: str, trouble: dict[int, str], supervised: Path | None = None) -> None:
    """Make shards as files that name their maker."""
    claims = Claims(directory, worker, supervised)
    try:
        for index in claims.share(
            "part", COUNT, lambda index: (directory / f"{index}").exists(), lambda index: f"row {index}"
        ):
            what = trouble.get(index)
            if what == "kill" or (what == "once" and not (directory / f"{index}.tried").exists()):
                (directory / f"{index}.tried").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise ValueError(f"cannot make {index}")
            time.sleep(0.02)
            with open(directory / f"{index}", "x") as file:  # a second maker would fail here
                file.write(worker)
    except ValueError as error:
        claims.failed(error)
        os._exit(1)


def together(directory: Path, workers: int, trouble: dict[int, str] | None = None) -> list[int]:
    """Exit codes of forked workers, which begin at the same moment."""
    children, begin = [], time.monotonic() + 0.2
    for number in range(workers):
        child = os.fork()
        if child == 0:
            code = 3
            try:
                time.sleep(max(0.0, begin - time.monotonic()))
                work(directory, f"{number}/{workers}", trouble or {})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def made(directory: Path) -> set[int]:
    return {int(path.name) for path in directory.iterdir() if path.name.isdigit()}


def test_every_shard_is_made_once_and_by_several(tmp_path):
    assert together(tmp_path, 4) == [0, 0, 0, 0]
    assert made(tmp_path) == set(range(COUNT))
    assert len({(tmp_path / str(index)).read_text() for index in range(COUNT)}) >= 2  # four, unless the machine is busy


def test_what_a_killed_worker_held_another_makes(tmp_path):
    codes = together(tmp_path, 3, {5: "once"})
    assert sorted(codes) == [-signal.SIGKILL, 0, 0]
    assert made(tmp_path) == set(range(COUNT))
    assert not poison(tmp_path)


@pytest.mark.parametrize(("what", "ends"), [("raise", "ValueError: cannot make 7 on"), ("kill", "killed on")])
def test_a_shard_that_fails_twice_is_set_aside_and_named(tmp_path, what, ends):
    codes = together(tmp_path, 4, {7: what})
    assert sorted(code == 0 for code in codes) == [False, False, True, True]  # two tries, no third
    assert made(tmp_path) == set(range(COUNT)) - {7}
    (shard,) = poison(tmp_path)
    assert (shard.name, shard.items, len(shard.tries)) == ("part-00007", "row 7", 2)
    assert all(ends in line for line in shard.tries)
    with pytest.raises(StageError, match=r"1 of its shards failed 2 times.*part-00007 \(row 7\).*Mend the cause"):
        raise_poison("sample", [shard])


def test_a_lone_worker_makes_all_but_the_poison(tmp_path):
    assert together(tmp_path, 1, {0: "raise"}) == [1]
    assert together(tmp_path, 1, {0: "raise"}) == [1]
    assert made(tmp_path) == set(range(1, COUNT))  # what failed before comes last
    assert [shard.name for shard in poison(tmp_path)] == ["part-00000"]
    assert together(tmp_path, 1, {0: "raise"}) == [0]  # nobody tries it a third time


def work_ahead(directory: Path, worker: str, ahead: int, bad: int | None = None) -> None:
    """Make shards as files, `ahead` of them claimed at once; a worker that has claimed `bad` fails."""
    claims, claimed = Claims(directory, worker), []
    stream = claims.share_ahead("part", COUNT, lambda index: (directory / f"{index}").exists(), str)
    try:
        for index in stream:
            claimed += [] if index is None else [index]
            if index is not None and len(claimed) < ahead:
                continue
            for held in claimed:
                if held == bad:
                    raise ValueError(f"cannot make {held}")
                with open(directory / f"{held}", "x") as file:
                    file.write(worker)
                claims.finish(held)
            claimed.clear()
        assert not claimed and not claims.claimed
    except ValueError as error:
        claims.failed(error)
        os._exit(1)


def ahead_together(directory: Path, workers: int, bad: int | None = None) -> list[int]:
    children = []
    for number in range(workers):
        child = os.fork()
        if child == 0:
            code = 3
            try:
                work_ahead(directory, f"{number}/{workers}", 4, bad)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_workers_that_read_ahead_make_every_shard_once_and_wait_for_no_claim_of_their_own(tmp_path):
    assert ahead_together(tmp_path, 3) == [0, 0, 0]
    assert made(tmp_path) == set(range(COUNT)) and not poison(tmp_path)


def test_a_worker_that_reads_ahead_leaves_the_others_their_part(tmp_path):
    claims, held = Claims(tmp_path, "1/5"), []
    for index in claims.share_ahead("part", COUNT, lambda index: False, str):
        held.append(len(claims.claimed))
        if index is None:
            for claimed in list(claims.claimed):
                claims.finish(claimed)
    assert max(held) == 3 and not claims.claimed  # a fifth of twelve, rounded up
    assert sum("start" in line for _, lines in history(tmp_path) for line in lines) == COUNT


def test_a_bad_shard_costs_the_shards_claimed_beside_it_one_try_only(tmp_path):
    while 1 in ahead_together(tmp_path, 1, bad=5):
        pass
    assert made(tmp_path) == set(range(COUNT)) - {5}
    assert [shard.name for shard in poison(tmp_path)] == ["part-00005"]
    tries = {name: sum("start" in line for line in lines) for name, lines in history(tmp_path)}
    assert max(tries.values()) == 2


def test_failures_are_forgotten_when_the_work_is_begun_anew(tmp_path):
    together(tmp_path, 2, {3: "raise"})
    assert poison(tmp_path)
    forget(tmp_path)
    assert together(tmp_path, 2) == [0, 0]
    assert made(tmp_path) == set(range(COUNT))
    assert {
        int(name.rpartition("-")[2]) for name, lines in history(tmp_path) if any("start" in line for line in lines)
    } == {3}


def test_a_worker_whose_run_is_gone_takes_no_further_shard(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()  # nobody holds it
    with pytest.raises(TransientError, match="the run that started this worker is gone"):
        work(tmp_path, "0/1", {}, supervised=lock)
    assert not made(tmp_path)


def test_a_line_that_a_kill_cut_is_no_try(tmp_path):
    (tmp_path / CLAIMS).mkdir()
    (tmp_path / CLAIMS / "part-00002").write_text('{"start": 1.0, "worker": 0, "host": "a", "items": "x"}\n{"sta')
    assert together(tmp_path, 1) == [0]
    assert made(tmp_path) == set(range(COUNT))


def test_rows_are_named_by_their_ids():
    assert label_of([]) == "no rows"
    assert label_of([{"prompt_id": "p1"}]) == "p1"
    assert label_of([{"pair_id": "p1/0-1", "prompt_id": "p1"}, {"pair_id": "p2/0-1"}]) == "p1/0-1 ... p2/0-1"
