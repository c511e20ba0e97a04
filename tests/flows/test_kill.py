"""Kill any process of a run with -9, ten times, and type the same command again: nothing is lost, doubled, left running or left lying about."""

import collections
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from data_contracts.shards import read_shard
from data_contracts.store import Store
from stages.stage import events

KILLS = 10
REMAINS_SECONDS = 20
"""A stage gets 10 s of grace to end by itself; its tree must be gone soon after."""


class Run:
    """One `python -m flows`, and every process that came from it: all inherit a mark, wherever they hang."""

    def __init__(self, tools, config: Path, store: Path, log: Path):
        self.tools, self.mark, self.log = tools, f"KILL_TEST={uuid.uuid4().hex}", log
        name, _, value = self.mark.partition("=")
        self.from_byte = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self.main = subprocess.Popen(
                [sys.executable, "-m", "flows", str(config), "--store", str(store)], cwd=tools.root, env=tools.environment(**{name: value}),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.began = time.monotonic()

    @property
    def running(self) -> bool:
        return self.main.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_bytes()[self.from_byte :].decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        return self.tools.processes_of(self.mark)

    def seconds_until_gone(self, limit: float) -> float:
        """After the main process ended: how long the last of its processes lived on."""
        began = time.monotonic()
        while self.processes():
            if time.monotonic() - began > limit:
                pytest.fail(f"still there after {limit} s: " + "; ".join(f"{role(process)} {process}" for process in self.processes()))
            time.sleep(0.1)
        return time.monotonic() - began

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        self.main.wait()


def role(process: psutil.Process) -> str:
    """What a process of a run is, by its command."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return "gone"
    if "stages.supervise" in words:
        return "server supervisor" if "uvicorn" in words else "stage supervisor"
    for name, mark in (("server", "uvicorn"), ("main", "flows"), ("check", "stages.sampling.check"), ("stage", "stages")):
        if mark in words:
            return f"stage {words[words.index('stages') + 1]}" if name == "stage" else name
    return "other"


def in_a_stage(run: Run) -> bool:
    return any(role(process).startswith("stage ") and not role(process).endswith("supervisor") for process in run.processes())


def wait_for_the_moment(run: Run, chance: random.Random, unit: float) -> None:
    """Three times in ten somewhere in the start-up, else some way into the stages. Returns at once if the run ends."""
    into_stages, wait = chance.random() > 0.3, chance.uniform(0, 2.5 * unit)
    while into_stages and run.running and not in_a_stage(run):
        time.sleep(0.05)
    end = time.monotonic() + wait
    while run.running and time.monotonic() < end:
        time.sleep(0.02)


def kill_one(run: Run, chance: random.Random) -> str:
    """SIGKILL to one process of the tree, any with equal chance; says which."""
    alive = sorted(run.processes(), key=lambda process: process.create_time())
    victim = chance.choice(alive)
    name = role(victim)
    try:
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        name += " (already gone)"
    return name


def wait_for_the_end(run: Run, seconds: float) -> bool:
    """Whether the run ends within some seconds; one that lost only a stage or its server may go on by itself."""
    try:
        run.main.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill_ten_times(tools, config: Path, directory: Path, seed: int, unit: float, check) -> list[str]:
    """The experiment. `check(store, kills)` looks at every store whose run came to its end; returns what happened, line by line."""
    chance, story, number, kills_here = random.Random(seed), [], 0, 0
    store, log, began = directory / "store-0", directory / "run.log", time.monotonic()
    run, old = Run(tools, config, store, log), []
    try:
        for kill in range(KILLS):
            if not run.running:
                old.append(run)
                run = Run(tools, config, store, log)
            wait_for_the_moment(run, chance, unit)
            if not run.running and run.main.returncode == 0:  # quicker than its killer: begin anew
                check(store, kills_here)
                number, kills_here = number + 1, 0
                store = directory / f"store-{number}"
                old.append(run)
                run = Run(tools, config, store, log)
                wait_for_the_moment(run, chance, unit)
            at = time.monotonic() - run.began
            assert run.running, run.output
            name = kill_one(run, chance)
            kills_here += 1
            ended = wait_for_the_end(run, 8)
            story.append(
                f"{time.monotonic() - began:6.1f} s  kill {kill + 1}: {name}, {at:.1f} s into the run -> "
                + (f"exit {run.main.returncode}" if ended else "it goes on")
            )
            if ended:  # the same command at once, as an impatient user would; the remains of the old run must be gone soon
                old.append(run)
                run = Run(tools, config, store, log)
                story[-1] += f", remains gone after {old[-1].seconds_until_gone(REMAINS_SECONDS):.1f} s"
        assert run.main.wait(400) == 0, run.output
        story.append(
            f"{time.monotonic() - began:6.1f} s  done; waited for a lock {log.read_text(errors='replace').count(': waiting')} times"
        )
        check(store, kills_here)
        assert run.seconds_until_gone(REMAINS_SECONDS) < REMAINS_SECONDS
        assert not [process for each in old for process in each.processes()]
        return story
    finally:
        print("\n".join(story))
        for each in [*old, run]:
            each.end()


def rows_of(store: Store) -> dict[str, list[dict]]:
    """The rows of every Parquet shard, by artifact."""
    found = {}
    for record in store.records():
        directory = store.directory(record.kind, record.key)
        for path in sorted(directory.glob("*.parquet")):
            prefix = path.name.split("-")[0]
            found[f"{record.kind}/{record.key}/{path.name}"] = read_shard(path, record.kind if prefix == "part" else prefix).to_pylist()
    return found


def assert_same_artifacts(store: Store, wanted: Store) -> None:
    mine, theirs = rows_of(store), rows_of(wanted)
    assert mine.keys() == theirs.keys()
    for name, rows in theirs.items():
        assert mine[name] == rows, name
    digests = [{(record.kind, record.key): record.content for record in each.records()} for each in (store, wanted)]
    assert digests[0] == digests[1]  # the weights of the checkpoints too


def assert_little_was_done_twice(store: Store, kills: int, save_every_steps: int) -> None:
    restarts = 0
    for record in store.records():
        history = events(store.directory(record.kind, record.key))
        starts = sum(event["event"] == "start" for event in history)
        shards = collections.Counter(event["index"] for event in history if event["event"] == "shard")
        steps = collections.Counter(event["index"] for event in history if event["event"] == "step")
        assert not shards or max(shards.values()) == 1, f"{record.kind} {record.key}: a finished shard was made again: {shards}"
        again = sum(count - 1 for count in steps.values())
        assert again <= save_every_steps * max(0, starts - 1), (
            f"{record.kind} {record.key}: {again} steps again in {starts} starts: {steps}"
        )
        restarts += max(0, starts - 1)
    assert restarts <= kills


def assert_tidy(store: Store) -> None:
    litter = [path for path in store.root.joinpath("artifacts").rglob("*") if ".tmp-" in path.name or path.name in ("resume", ".export")]
    assert not litter
    assert not [path for path in store.root.joinpath("artifacts").glob("*/*") if not (path / "record.json").is_file()]
    for path in store.root.joinpath("locks").iterdir():
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if anyone still holds it


def test_ten_kills_at_random_moments_change_nothing(undisturbed, tools, tmp_path):
    wanted = tools.table_of(undisturbed.store, "tiny")

    def check(directory: Path, kills: int) -> None:
        store = Store(directory)
        assert tools.table_of(directory, "tiny") == wanted
        assert not [problem for record in store.records() for problem in store.problems(record, deep=True)]
        assert_same_artifacts(store, Store(undisturbed.store))
        assert_little_was_done_twice(store, kills, save_every_steps=1)
        assert_tidy(store)

    unit = undisturbed.first.seconds / 14
    seed = int(os.environ.get("KILL_TEST_SEED", "1"))
    kill_ten_times(tools, undisturbed.config, tmp_path, seed, unit, check)
