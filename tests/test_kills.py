"""The comparison behind `benchmarks.kills` can fail: what is lost, doubled or left behind is planted, and has to be reported.

Strategy: a small store of signed artifacts, log-probs, a ledger and MLflow's tables stands for an undisturbed run; a copy of
it is changed in one way each.
"""

import json
import random
import shutil
import signal
import sqlite3
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks._kill_compare import mirror_problems, problems
from benchmarks._kill_kinds import Kind, copy_store, keep_first, kinds, words_of
from benchmarks._kill_plan import Baseline, choose
from benchmarks._kill_watch import FileEvent, Play, Watch, start_anew
from data_contracts.files import write_atomic
from data_contracts.ledger import Ledger
from data_contracts.mirror import Mirror
from data_contracts.shards import to_table, write_shard
from data_contracts.store import Store
from flows.comparison import load_comparison
from flows.config import load_run
from tests.conftest import prompt_rows

LOGPS = "logps/0123456789abcdef-bfloat16-logps-1"


@pytest.fixture
def undisturbed(tmp_path, make_artifact) -> Path:
    store = Store(tmp_path / "undisturbed")
    ledger = Ledger(store, "demo", "s1")
    ledger.begin()
    for number in range(2):
        ref = make_artifact(store, "prompts", prompt_rows(2, first=2 * number))
        record = store.load("prompts", ref.key)
        assert record is not None
        ledger.finished(f"iter_{number:02d}", "prompts", "prompts", record, False, time.time(), 0.0)
        store.show_in_run("demo", f"iter_{number:02d}", "prompts", ref)
        time.sleep(0.02)  # artifacts are put in order by the times of their records
    ledger.end()
    write_atomic(store.run_directory("demo") / "report.md", "# Demo\n\n| score | train s |\n|---|---|\n| 0.5 | 1.5 |\n")
    rows = [{"key": bytes([number] * 16), "logps": [-0.5, -1.5]} for number in range(3)]
    write_shard(store.root / LOGPS / "part-0123456789abcdef.parquet", to_table(rows, "token_logps"))
    mirror(store.root / "mlflow.db", ["FINISHED"])
    return store.root


def mirror(path: Path, states: list[str], metrics: int = 1) -> None:
    """Write the tables of MLflow that are compared: a session per state."""
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute("create table runs (run_uuid, name, status, start_time)")
        for table in (
            "tags (run_uuid, key, value)",
            "params (run_uuid, key, value)",
            "model_version_tags (name, key, value)",
        ):
            database.execute(f"create table {table}")
        database.execute("create table metrics (run_uuid, key, step, value)")
        for number, state in enumerate(states):
            database.execute("insert into runs values (?, 'demo', ?, ?)", (f"r{number}", state, number))
            database.executemany("insert into metrics values (?, 'loss', 1, 0.5)", [(f"r{number}",)] * metrics)


@pytest.fixture
def struck(undisturbed, tmp_path) -> Path:
    """An equal store in which what may differ does."""
    path = tmp_path / "struck"
    copy_store(undisturbed, path)
    mirror(path / "mlflow.db", ["KILLED", "FINISHED"])
    report = path / "runs" / "demo" / "report.md"
    report.write_text(report.read_text().replace("1.5", "9.9"))
    for record in path.glob("artifacts/*/*/record.json"):
        other = json.loads(record.read_text()) | {"seconds": {"wall": 7.0}, "provenance": {"session": "another"}}
        record.write_text(json.dumps(other))
        (record.parent / "stage.log").write_text("another log")
    again = Ledger(Store(path), "demo", "s2")
    again.begin()
    again.end()
    (path / LOGPS / "part-0123456789abcdef.parquet").rename(path / LOGPS / "part-fedcba9876543210.parquet")
    return path


def first_shard(store: Path) -> Path:
    return min(store.glob("artifacts/prompts/*/part-00000.parquet"))


def doubled_line(store: Path) -> None:
    """The ledger counts an artifact at a second place too."""
    path = store / "runs" / "demo" / "ledger.jsonl"
    line = next(line for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "stage")
    with open(path, "a") as file:
        file.write(json.dumps(line | {"session": "s2", "step": "iter_09"}) + "\n")


def lost_lines(store: Path) -> None:
    path = store / "runs" / "demo" / "ledger.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"iter_01"' not in line))


def doubled_logps(store: Path) -> None:
    shutil.copy(store / LOGPS / "part-fedcba9876543210.parquet", store / LOGPS / "part-0000000000000000.parquet")


PLANTED = {
    "lost: artifacts/prompts/": lambda store: first_shard(store).unlink(),
    "other content: artifacts/prompts/": lambda store: first_shard(store).write_bytes(b"half"),
    "left behind: artifacts/prompts/": lambda store: shutil.copytree(
        first_shard(store).parent, first_shard(store).parent.with_name("f" * 16)
    ),
    "temporary file left behind: artifacts/prompts/": lambda store: (
        first_shard(store).with_name(".part-00000.parquet.tmp-host-7").touch()
    ),
    "temporary file left behind: logps/": lambda store: (store / LOGPS / ".part-0.parquet.tmp-host-7").touch(),
    "left behind: set_aside/": lambda store: (store / "set_aside" / "2026-11-28-prompts-abc").mkdir(parents=True),
    "lost: runs/demo/iter_01/prompts": lambda store: (store / "runs" / "demo" / "iter_01" / "prompts").unlink(),
    "other content: runs/demo/report.md": lambda store: (store / "runs" / "demo" / "report.md").write_text("# De"),
    "lost: runs/demo/ledger.jsonl does not say what": lost_lines,
    "doubled: runs/demo/ledger.jsonl counts": doubled_line,
    "lost: 3 rows of logps/": lambda store: (store / LOGPS / "part-fedcba9876543210.parquet").unlink(),
    "doubled: 3 rows of logps/": doubled_logps,
    "left behind: MLflow says that 1 dead runs": lambda store: mirror(store / "mlflow.db", ["RUNNING", "FINISHED"]),
    "doubled: MLflow has 3 runs demo of 2 sessions": lambda store: mirror(
        store / "mlflow.db", ["KILLED", "KILLED", "FINISHED"]
    ),
    "MLflow says that the last run demo is FAILED": lambda store: mirror(store / "mlflow.db", ["KILLED", "FAILED"]),
    "doubled: MLflow's  loss 1 0.5": lambda store: mirror(store / "mlflow.db", ["FINISHED"], metrics=2),
    "lost: MLflow's  loss 1 0.5": lambda store: mirror(store / "mlflow.db", ["FINISHED"], metrics=0),
}


def test_an_equal_store_has_no_problems(undisturbed, struck):
    assert problems(undisturbed, struck, sessions=2) == []


@pytest.mark.parametrize("expected", PLANTED)
def test_what_is_planted_is_reported(undisturbed, struck, expected):
    PLANTED[expected](struck)
    sentences = problems(undisturbed, struck, sessions=2)
    assert any(sentence.startswith(expected) for sentence in sentences), sentences


def test_what_a_mirror_lacks_is_reported(tmp_path, make_artifact):
    store, mirror = Store(tmp_path / "store"), Mirror(f"file://{tmp_path}/mirror")
    names = {}
    for stage in ("sample", "prompts", "score"):  # prompts are never mirrored
        ref = make_artifact(store, "prompts", prompt_rows(2, first=len(stage)))
        record = store.load("prompts", ref.key)
        assert record is not None
        names[stage] = f"artifacts/prompts/{ref.key}"
        signed = store.sign(record.model_copy(update={"stage": stage}))
        if stage != "prompts":
            mirror.push(store, signed)
    assert mirror_problems(store.root, tmp_path / "mirror") == []
    min((tmp_path / "mirror" / names["sample"]).glob("*/part-00000.parquet")).write_bytes(b"half")
    (tmp_path / "mirror" / names["score"] / "record.json").unlink()
    assert sorted(mirror_problems(store.root, tmp_path / "mirror")) == sorted(
        f"lost: {names[stage]} is not in the mirror" for stage in ("sample", "score")
    )


def test_a_lock_that_is_held_is_reported(undisturbed, struck):
    with Store(struck).lock("prompts", "a" * 16):
        assert problems(undisturbed, struck, sessions=2) == ["lock still held: prompts-" + "a" * 16]


def test_a_part_of_a_store_has_the_first_artifacts_and_their_lines(undisturbed, tmp_path):
    copy_store(undisturbed, tmp_path / "part")
    write_atomic(_directory(tmp_path / "part" / "runs" / "pairs") / "report.md", "a comparison")
    keep_first(tmp_path / "part", 1)
    assert len(list((tmp_path / "part").glob("artifacts/prompts/*"))) == 1
    assert not (tmp_path / "part" / "runs" / "pairs").exists()
    (line,) = (tmp_path / "part" / "runs" / "demo" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == "iter_00"


def _directory(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_files_are_seen_as_they_appear_under_names_that_every_run_has(tmp_path):
    with Watch(tmp_path) as watch:
        directory = tmp_path / "artifacts" / "prompts" / ("a" * 16)
        directory.mkdir(parents=True)
        write_atomic(directory / "record.json", "{}")
        events = watch.read(1.0)
    assert FileEvent("artifacts/prompts/*/record.json", "renamed") in events or (
        FileEvent("artifacts/prompts/*/record.json", "created") in events
    )
    assert FileEvent("artifacts", "created") in events


def test_a_process_that_is_left_behind_is_found_and_ended(tmp_path):
    leaver = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = partial(start_anew, [sys.executable, "-c", leaver], tmp_path / "log", tmp_path)
    play = Play(begin, {}, f"SELFPLAY_KILLS={tmp_path.name}")
    assert play.has_ended(30) and play.code == 0
    (process,) = play.remaining(0.2)
    assert "sleep(60)" in process.command
    assert play.remaining(10) == []


def test_a_seed_decides_every_strike():
    names = ("artifacts/generations/*/record.json", "runs/kto/report.md", "locks/generations-*")
    events = [FileEvent(name, "renamed") for name in names] * 3
    baseline, kind = Baseline(Path("store"), events, 20.0, 0), Kind("kto")
    first, second = (
        [str(choose(rng, kind, baseline)) for _ in range(20)] for rng in (random.Random(7), random.Random(7))
    )
    assert first == second and len(set(first)) > 15
    kills = [kill for _ in range(50) for kill in choose(random.Random(_), kind, baseline).kills]
    assert {signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP} <= {kill.number for kill in kills}
    assert {kill.event for kill in kills} >= set(events)


def test_every_kind_has_a_run_config_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks._smoke.tiny_model", lambda directory, seed=0: str(directory))
    all_kinds = kinds(tmp_path)
    assert len(all_kinds) == 19
    for kind in all_kinds.values():
        words = words_of(kind, tmp_path, tmp_path / "store")
        config = next((word for word in words if word.endswith(".yaml")), None)
        if kind.words[0] == "compare":
            assert len(load_comparison(tmp_path / "compare.yaml").variants) == 2
        elif config is not None:
            assert load_run(config).iterations <= 3
        assert str(tmp_path / "store") in " ".join(words)
