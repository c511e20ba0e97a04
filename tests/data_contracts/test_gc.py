"""Garbage collection: nothing that a kept run can still ask for goes, all else does, and a dry run only says so.

Strategy: chains of small signed artifacts (prompts -> generations -> checkpoint), shown by runs of different ages.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data_contracts.store
from data_contracts.artifact import RECORD, ArtifactRecord, ArtifactRef
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.files import bytes_from_environment, is_abandoned
from data_contracts.gc import gc, kept_lines, main, reasons_to_keep
from data_contracts.set_aside import list_set_aside, set_aside
from data_contracts.store import Store

ROOT = Path(__file__).resolve().parents[2]


def make(store: Store, kind: str, key: str, **inputs: ArtifactRef) -> ArtifactRef:
    directory = store.directory(kind, key)
    directory.mkdir(parents=True)
    (directory / "part-00000.parquet").write_text(f"{kind} {key} " * 100)
    inputs |= {"start": ArtifactRef(kind="checkpoint", key="external", path="/m", content="ab" * 32)}
    record = ArtifactRecord(
        kind=kind,
        key=key,
        stage="test",
        version="1",
        config={},
        inputs=inputs,
        content="",
        files=[],
        rows=1,
        seconds={"wall": 1.0},
    )
    return store.sign(record).ref(str(directory))


def grow_old(store: Store, seconds: float = 7200) -> None:
    then = time.time() - seconds
    for path in store.root.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (then, then))


@pytest.fixture
def three_runs(store) -> dict[str, ArtifactRef]:
    """Runs a, b, c, the oldest first; b and c share prompts; c's checkpoint came from b's."""
    made = {"p-a": make(store, "prompts", "pa"), "p": make(store, "prompts", "p")}
    made["g-a"] = make(store, "generations", "ga", prompts=made["p-a"])
    made["c-a"] = make(store, "checkpoint", "ca", pairs=made["g-a"])
    made["g-b"] = make(store, "generations", "gb", prompts=made["p"])
    made["c-b"] = make(store, "checkpoint", "cb", pairs=made["g-b"])
    made["c-c"] = make(store, "checkpoint", "cc", policy=made["c-b"])
    for run, names in (("a", ("p-a", "g-a", "c-a")), ("b", ("p", "g-b", "c-b")), ("c", ("c-c",))):
        for name in names:
            store.show_in_run(run, "iter_01", name, made[name])
        (store.root / "runs" / run / "report.md").write_text("report")
    grow_old(store)
    for age, run in enumerate("cba"):
        for link in (store.root / "runs" / run / "iter_01").iterdir():
            then = time.time() - 7200 - 60 * age
            os.utime(link, (then, then), follow_symlinks=False)
    return made


def left(store: Store) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in store.root.glob("artifacts/*/*")}


EVERYTHING = {
    "prompts/pa",
    "prompts/p",
    "generations/ga",
    "generations/gb",
    "checkpoint/ca",
    "checkpoint/cb",
    "checkpoint/cc",
}
OF_C = {"prompts/p", "generations/gb", "checkpoint/cb", "checkpoint/cc"}


@pytest.mark.parametrize(("runs", "kept"), [(3, EVERYTHING), (2, OF_C), (1, OF_C), (0, set())])
def test_what_a_kept_run_came_from_stays_all_the_way_back(store, three_runs, runs, kept):
    assert left(store) == EVERYTHING
    removed = {
        f"{removal.path.parent.name}/{removal.path.name}"
        for removal in gc(store, runs, dry_run=True)
        if removal.path.parents[1].name == "artifacts"
    }
    assert left(store) == EVERYTHING and EVERYTHING - kept == removed
    gc(store, runs)
    assert left(store) == kept
    assert all((store.root / "runs" / run / "report.md").is_file() for run in "abc")
    assert [problem for record in store.records() for problem in store.problems(record, deep=True)] == []
    assert gc(store, runs) == []


def test_what_is_young_or_being_built_stays_with_its_inputs(store, three_runs):
    fresh = make(store, "generations", "fresh")
    building = store.directory("checkpoint", "busy")
    building.mkdir()
    (building / "spec.json").write_text(json.dumps({"inputs": {"pairs": three_runs["g-a"].model_dump()}}))
    then = time.time() - 90 * 86400
    for path in (building, building / "spec.json"):
        os.utime(path, (then, then))
    with store.lock("checkpoint", "busy"):
        gc(store, 0)
        assert left(store) == {"generations/fresh", "checkpoint/busy", "generations/ga", "prompts/pa"}
    gc(store, 0)
    assert left(store) == {"generations/fresh"} and Path(fresh.path).is_dir()


def test_what_stays_is_said_with_the_reason(store, three_runs):
    """The newest run that has an artifact is named; young work, locked work and its inputs have reasons of their own."""
    make(store, "generations", "fresh")
    for key, ref in (("busy", three_runs["g-a"]), ("wanted", three_runs["c-c"])):
        directory = store.directory("checkpoint", key)
        directory.mkdir()
        (directory / "spec.json").write_text(json.dumps({"inputs": {"x": ref.model_dump()}}))
        for path in (directory, directory / "spec.json"):
            os.utime(path, (time.time() - 7200, time.time() - 7200))
    with store.lock("checkpoint", "busy"):
        reasons = reasons_to_keep(store, 1)
        lines = kept_lines(store, reasons)
    of_c = "of the run c, or what it was made from"
    assert {f"{kind}/{key}": why for (kind, key), why in reasons.items()} == dict.fromkeys(OF_C, of_c) | {
        "generations/fresh": "younger than 60 minutes",
        "checkpoint/busy": "being built",
        "checkpoint/wanted": "unfinished work of a kept run, younger than 7 days",
        "generations/ga": "an input of what is not finished, or young",
        "prompts/pa": "an input of what is not finished, or young",
    }
    assert any(line.endswith(f"4 artifacts  ({of_c})") for line in lines) and len(lines) == 5
    assert reasons_to_keep(store, 3)["prompts", "pa"] == "of the run a, or what it was made from; no newer run has it"


def test_interrupted_work_of_a_kept_run_waits_a_week_for_it(store, three_runs):
    for key, ref in (("wanted", three_runs["c-c"]), ("orphan", three_runs["g-a"])):
        directory = store.directory("checkpoint", key)
        directory.mkdir()
        (directory / "spec.json").write_text(json.dumps({"inputs": {"x": ref.model_dump()}}))
    grow_old(store)
    gc(store, 1)
    assert left(store) == OF_C | {"checkpoint/wanted"}
    grow_old(store, 8 * 86400)
    gc(store, 1)
    assert left(store) == OF_C


def test_the_state_to_resume_from_goes_when_the_training_is_finished(store, three_runs):
    for key in ("cc", "ca"):
        (store.directory("checkpoint", key) / "resume" / "step1").mkdir(parents=True)
    half = store.directory("checkpoint", "half")
    (half / "resume").mkdir(parents=True)
    (half / "spec.json").write_text(json.dumps({"inputs": {"x": three_runs["c-c"].model_dump()}}))
    gc(store, 3)
    assert not (store.directory("checkpoint", "cc") / "resume").exists() and (half / "resume").is_dir()


def test_passes_of_forgotten_models_temporary_files_and_idle_locks_go(store, three_runs):
    known, forgotten = (
        store.root / "logps" / f"{'ab' * 8}-float32-logps-1",
        store.root / "logps" / f"{'ef' * 8}-float32-logps-1",
    )
    for path in (known, forgotten):
        path.mkdir(parents=True)
    (known / ".part-1.parquet.tmp-1").touch()
    dead = known / f".part-2.parquet.tmp-{os.uname().nodename}-{2**22 - 1}"
    alive = known / f".part-3.parquet.tmp-{os.uname().nodename}-{os.getpid()}"
    elsewhere = known / ".part-4.parquet.tmp-elsewhere-77"
    for path in (dead, alive, elsewhere):
        path.touch()
    for name in ("ca", "gone"):
        with store.lock("checkpoint", name):
            pass
    with store.lock("checkpoint", "held"):
        with store.lock_apart("database"):
            pass
        grow_old(store)
        gc(store, 3)
        locks = {path.name for path in (store.root / "locks").iterdir()}
    assert known.is_dir() and not forgotten.exists()
    assert not dead.exists() and alive.exists() and elsewhere.exists()
    assert {"checkpoint-ca", "checkpoint-held", ".database"} <= locks and "checkpoint-gone" not in locks
    then = time.time() - 2 * 86400
    os.utime(elsewhere, (then, then))
    assert is_abandoned(elsewhere) and not is_abandoned(alive) and not is_abandoned(known / "part-1.parquet")


def test_what_a_dead_writer_left_is_swept_in_any_room_and_inside_artifacts_only_counted(store, tmp_path):
    """Rooms need no registration: the store knows a temporary file, a link and a request for work by their names."""
    writer = f"tmp-{os.uname().nodename}-{2**22 - 1}"
    make(store, "prompts", "p")
    (tmp_path / "other-disk").mkdir()
    store.root.joinpath("judgements").symlink_to(tmp_path / "other-disk")
    swept = [
        store.root / "judgements" / f".a.json.{writer}",
        store.root / "a-new-room" / "deep" / f".b.{writer}",
        store.root / "runs" / "r" / f".link.{writer}",
        store.root / "work" / f".request.{writer}",
    ]
    kept = [
        store.root / "work" / f".recent.{writer}",
        store.root / "work" / ".far.tmp-elsewhere-7",
        store.directory("prompts", "p") / f".part-0.parquet.{writer}",
        store.root / "set_aside" / "old" / f".part-0.parquet.{writer}",
    ]
    for path in swept + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in (swept[3], kept[0], kept[1]):
        path.mkdir()
    for path in (swept[0], swept[1], kept[2], kept[3]):
        path.touch()
    swept[2].symlink_to(store.directory("prompts", "p"))
    grow_old(store)
    os.utime(kept[0])
    assert sorted(store.abandoned(in_artifacts=True)) == sorted([*swept, kept[2]])
    assert store.sweep() == len(swept)
    assert not any(path.is_symlink() or path.exists() for path in swept) and all(path.exists() for path in kept)
    assert store.find("prompts", "p") is not None
    assert list(store.abandoned(in_artifacts=False)) == [] and Store(tmp_path / "none").sweep() == 0


def test_a_lock_apart_is_a_lock_and_no_artifacts(store):
    with store.lock_apart("database"), store.lock("prompts", "p"):
        assert store.lock_names() == [("prompts", "p")]
        held = []
        with pytest.raises(InterruptedError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: held.append(1) or (_ for _ in ()).throw(InterruptedError))
            with store.lock_apart("database"):
                pass
        assert held == [1]
    with pytest.raises(ConfigError, match="cannot name something in the store"):
        store.lock_apart("../x")


def test_a_lock_whose_file_was_removed_between_opening_and_locking_is_taken_on_the_new_one(store):
    with store.lock("generations", "k"):
        (store.root / "locks" / "generations-k").unlink()
        with store.lock("generations", "k"):
            assert (store.root / "locks" / "generations-k").is_file()


def test_a_damaged_record_keeps_nothing_alive_and_stops_nothing(store, three_runs):
    (store.directory("checkpoint", "cc") / RECORD).write_text("{")
    grow_old(store)
    gc(store, 1)
    assert left(store) == {"checkpoint/cc"}


def test_the_command_says_what_and_how_much(store, three_runs, capsys):
    assert main(["--keep-runs", "1", "--dry-run", "--store", str(store.root)]) == 0
    output = capsys.readouterr().out
    assert "artifacts/generations/ga  (of no kept run)" in output and "links of the run a" in output
    assert "4 artifacts  (of the run c, or what it was made from)" in output.split("does not stay:")[0]
    assert "would set aside " in output.splitlines()[-1] and "that --keep-runs 1 does not keep" in output
    done = subprocess.run(
        [sys.executable, "-m", "data_contracts.gc", "--keep-runs", "-1", "--store", str(store.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--keep-runs is -1: it must be 0 or more" in done.stderr


# --- paths, and what is deleted


@pytest.mark.parametrize(
    "spelling", ["{root}", "{root}/", "{parent}/x/../store", "{parent}/link", "{parent}/link/../store", "./x/../store"]
)
def test_a_store_is_the_same_however_its_path_is_written(store, three_runs, spelling, monkeypatch):
    (store.root.parent / "x").mkdir()
    (store.root.parent / "link").symlink_to(store.root)
    monkeypatch.chdir(store.root.parent)
    other = Store(spelling.format(root=store.root, parent=store.root.parent))
    assert other.root == store.root
    assert gc(other, 3) == [] and left(store) == EVERYTHING
    other.show_in_run("d", "iter_01", "c-d", three_runs["c-a"])
    assert (store.root / "runs" / "d" / "iter_01" / "c-d" / RECORD).is_file()


def test_rooms_that_are_links_to_other_disks_and_links_written_with_other_paths_are_read_by_kind_and_key(
    store, three_runs, tmp_path
):
    for room in ("artifacts", "runs"):
        (store.root / room).rename(tmp_path / f"other-{room}")
        (store.root / room).symlink_to(tmp_path / f"other-{room}")
    link = store.root / "runs" / "c" / "iter_01" / "c-c"
    link.unlink()
    link.symlink_to("/mount/of/another/host/store/artifacts/checkpoint/cc")
    assert gc(store, 3) == [] and left(store) == EVERYTHING


def test_a_store_that_was_moved_keeps_what_its_runs_need(store, three_runs):
    moved = Store(store.root.rename(store.root.parent / "elsewhere"))
    assert gc(moved, 3) == []
    gc(moved, 1)
    assert left(moved) == OF_C


def test_nothing_goes_when_a_kept_run_reaches_nothing(store, three_runs):
    for link in (store.root / "runs" / "c" / "iter_01").iterdir():
        link.unlink()
        link.symlink_to("../../../../elsewhere/artifacts/checkpoint/none")
    for delete in (False, True):
        with pytest.raises(ConfigError, match="the run c is to be kept, and none of its links leads to an artifact of"):
            gc(store, 2, delete=delete)
    for run in "abc":
        shutil.rmtree(store.root / "runs" / run)
    with pytest.raises(
        ConfigError,
        match="no run of .* has links to artifacts, so --keep-runs 2 would keep none of 7: nothing is removed",
    ):
        gc(store, 2, delete=True)
    assert left(store) == EVERYTHING


def test_what_is_not_needed_is_set_aside_and_deleted_only_when_asked(store, three_runs, capsys):
    set_aside(store.root, store.directory("prompts", "pa"), "its record is odd", by="build")
    assert main(["--keep-runs", "1", "--store", str(store.root)]) == 0
    assert "the same command with --yes deletes them" in capsys.readouterr().out
    aside = {reason["was"]: (path, reason["by"]) for path, reason in list_set_aside(store.root)}
    assert {was: by for was, (_, by) in aside.items()} == {
        "artifacts/prompts/pa": "build", "artifacts/generations/ga": "gc", "artifacts/checkpoint/ca": "gc"
    }  # fmt: skip
    path, _ = aside["artifacts/checkpoint/ca"]
    assert path.parent == store.root / "set_aside" and path.name.endswith("-checkpoint-ca")
    path.rename(store.directory("checkpoint", "ca"))  # moved back, it counts again
    record = store.load("checkpoint", "ca")
    assert store.find("checkpoint", "ca") is not None and record is not None and store.problems(record, deep=True) == []
    grow_old(store)
    assert main(["--keep-runs", "1", "--yes", "--store", str(store.root)]) == 0
    assert "artifacts/checkpoint/ca  (of no kept run)" in capsys.readouterr().out and left(store) == OF_C
    assert [reason["was"] for _, reason in list_set_aside(store.root)] == ["artifacts/prompts/pa"], (
        "odd things are for people to delete"
    )


def test_what_a_killed_call_began_to_set_aside_goes_with_the_next(store, three_runs, monkeypatch):
    grow_old(store)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (store.directory("prompts", "pa") / f".set_aside.json.tmp-{os.uname().nodename}-{dead.pid}").write_text("{")

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_contracts.set_aside.shutil.move", killed)  # the reason is written, the directory not moved
        gc(store, 1)
    assert list(store.root.glob("artifacts/*/*/set_aside.json"))
    gc(store, 1)
    assert not list(store.root.glob("artifacts/*/*/*set_aside.json*"))
    assert not list(store.root.glob("set_aside/*/.set_aside.json*"))
    assert {reason["was"] for _, reason in list_set_aside(store.root)} == {
        "artifacts/checkpoint/ca", "artifacts/generations/ga", "artifacts/prompts/pa"
    }  # fmt: skip


def test_what_a_killed_call_began_to_delete_goes_with_the_next(store, three_runs):
    grow_old(store)
    (store.directory("prompts", "pa") / RECORD).unlink()  # goes first; that its directory changed makes nothing young
    gc(store, 1, delete=True)
    assert not store.directory("prompts", "pa").exists()


def test_two_things_of_one_name_are_set_aside_side_by_side(store):
    for _ in range(2):
        make(store, "prompts", "pa")
        set_aside(store.root, store.directory("prompts", "pa"), "twice", by="gc")
    assert len(list_set_aside(store.root)) == 2


# --- the budget


@pytest.mark.parametrize(("text", "count"), [("", 7), ("12", 12), ("1.5K", 1536), ("2 GiB", 2 << 30), ("3tb", 3 << 40)])
def test_an_amount_of_bytes(monkeypatch, text, count):
    monkeypatch.setenv("AMOUNT", text)
    assert bytes_from_environment("AMOUNT", 7) == count


def test_a_store_beyond_its_budget_or_on_a_full_disk_is_not_built_in(store, three_runs, monkeypatch):
    store.check_room()
    monkeypatch.setenv("SELFPLAY_STORE_MAX_BYTES", "1G")
    store.check_room()
    monkeypatch.setenv("SELFPLAY_STORE_MAX_BYTES", "1K")
    with pytest.raises(ArtifactError, match="its budget SELFPLAY_STORE_MAX_BYTES is 1 KiB. `selfplay gc"):
        store.check_room()
    monkeypatch.delenv("SELFPLAY_STORE_MAX_BYTES")
    monkeypatch.setenv("SELFPLAY_STORE_MIN_FREE_BYTES", "999T")
    with pytest.raises(ArtifactError, match="left, less than 999 TiB"):
        store.check_room()
    monkeypatch.setenv("SELFPLAY_STORE_MIN_FREE_BYTES", "much")
    with pytest.raises(ConfigError, match="SELFPLAY_STORE_MIN_FREE_BYTES is 'much'"):
        store.check_room()
    monkeypatch.delenv("SELFPLAY_STORE_MIN_FREE_BYTES")
    monkeypatch.setattr(data_contracts.store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 255 << 20}))
    with pytest.raises(ArtifactError, match="has 255 MiB left, less than 256 MiB"):
        Store(store.root / "not" / "yet").check_room()
