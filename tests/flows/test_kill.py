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
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_contracts.shards import read_shard
from data_contracts.store import Store
from stages.running.history import events

KILLS = 10
FEW_KILLS = 4
"""In the default suite: a kill and what follows it take 20 s."""
REMAINS_SECONDS = 20
"""A stage gets 10 s of grace to end by itself; its tree must be gone soon after."""


class Run:
    """One `selfplay run`, and every process that came from it: all inherit a mark, wherever they hang."""

    def __init__(self, tools, config: Path, store: Path, log: Path):
        self.tools, self.mark, self.log = tools, f"KILL_TEST={uuid.uuid4().hex}", log
        name, _, value = self.mark.partition("=")
        self.from_byte = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self.main = subprocess.Popen(
                [sys.executable, "-m", "flows", "run", str(config), "--store", str(store)], cwd=tools.root, env=tools.environment(**{name: value}),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.began, self.hits = time.monotonic(), 0

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
                pytest.fail(
                    f"still there after {limit} s: "
                    + "; ".join(f"{role(process)} {process}" for process in self.processes())
                )
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
    if "stages.running.supervise" in words:
        return "server supervisor" if "uvicorn" in words else "stage supervisor"
    for name, mark in (
        ("server", "uvicorn"),
        ("main", "flows"),
        ("check", "stages.sampling.check"),
        ("stage", "stages"),
    ):
        if mark in words:
            return f"stage {words[words.index('stages') + 1]}" if name == "stage" else name
    return "other"


def in_a_stage(run: Run) -> bool:
    return any(
        role(process).startswith("stage ") and not role(process).endswith("supervisor") for process in run.processes()
    )


def wait_for_the_moment(run: Run, chance: random.Random, unit: float) -> None:
    """Three times in ten somewhere in the start-up, else some way into the stages. Returns at once if the run ends."""
    into_stages, wait = chance.random() > 0.3, chance.uniform(0, 1.5 * unit)
    while into_stages and run.running and not in_a_stage(run):
        time.sleep(0.05)
    end = time.monotonic() + wait
    while run.running and time.monotonic() < end:
        time.sleep(0.02)


def kill_one(run: Run, chance: random.Random) -> str:
    """SIGKILL to one process of the tree; says which. Those that do the work are hit more often than those that watch over it."""
    alive = sorted(run.processes(), key=lambda process: process.create_time())
    roles = [role(process) for process in alive]
    weight = [
        4 if name.startswith("stage ") and "supervisor" not in name else 2 if name == "main" else 1 for name in roles
    ]
    number = chance.choices(range(len(alive)), weight)[0]
    try:
        alive[number].send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        roles[number] += " (it was quicker)"
    run.hits += 1
    return roles[number]


class Experiment:
    """One config run again and again while its processes are killed, in a new store whenever a run came to its end."""

    def __init__(self, tools, config: Path, directory: Path, check: Callable[[Path, int], None]):
        self.tools, self.config, self.directory, self.check = tools, config, directory, check
        self.story: list[str] = []
        self.stores, self.kills_in_store = 0, 0
        self.began = time.monotonic()
        self.runs: list[Run] = []
        self.start()

    @property
    def run(self) -> Run:
        return self.runs[-1]

    @property
    def store(self) -> Path:
        return self.directory / f"store-{self.stores}"

    def start(self) -> None:
        self.runs.append(Run(self.tools, self.config, self.store, self.directory / "run.log"))

    def tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self.began:6.1f} s  {text}")

    def finish(self) -> None:
        """The run is at its end: nothing may differ."""
        assert self.run.main.wait() == 0, self.run.output
        self.tell(f"done after {self.kills_in_store} kills")
        self.run.seconds_until_gone(REMAINS_SECONDS)
        self.check(self.store, self.kills_in_store)

    def kill(self, chance: random.Random, unit: float) -> None:
        """Wait for some moment, kill something. A run that dies of it is started again at once, as an impatient user would."""
        while True:
            wait_for_the_moment(self.run, chance, unit)
            if self.run.running:
                break
            if self.run.main.returncode == 0:  # quicker than its killer: begin anew
                self.finish()
                self.stores, self.kills_in_store = self.stores + 1, 0
            else:
                assert self.run.hits, self.run.output
            self.start()
        at = time.monotonic() - self.run.began
        name = kill_one(self.run, chance)
        self.kills_in_store += 1
        try:
            self.run.main.wait(3)
        except subprocess.TimeoutExpired:
            self.tell(f"{name} killed {at:.1f} s into the run: it goes on")
            return
        dead = self.run
        self.start()
        gone = dead.seconds_until_gone(REMAINS_SECONDS)
        self.tell(
            f"{name} killed {at:.1f} s into the run: exit {dead.main.returncode}, all of it gone after {gone:.1f} s"
        )

    def until_done(self) -> None:
        """Type the command again until it ends well; a run may still die of the last kill, an undisturbed one may not."""
        while self.run.main.wait(400) != 0:
            assert self.run.hits, self.run.output
            self.start()
        self.finish()
        assert not [process for run in self.runs for process in run.processes()]


def kill_often(
    tools, config: Path, directory: Path, unit: float, check: Callable[[Path, int], None], kills: int = KILLS
) -> None:
    chance = random.Random(int(os.environ.get("KILL_TEST_SEED", "1")))
    experiment = Experiment(tools, config, directory, check)
    try:
        for _ in range(kills):
            experiment.kill(chance, unit)
        experiment.until_done()
    finally:
        print("\n".join(experiment.story))
        for run in experiment.runs:
            run.end()


def rows_of(store: Store) -> dict[str, list[dict]]:
    """The rows of every Parquet shard, by artifact."""
    found = {}
    for record in store.records():
        directory = store.directory(record.kind, record.key)
        for path in sorted(directory.glob("*.parquet")):
            prefix = path.name.split("-")[0]
            found[f"{record.kind}/{record.key}/{path.name}"] = read_shard(
                path, record.kind if prefix == "part" else prefix
            ).to_pylist()
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
        assert not shards or max(shards.values()) == 1, (
            f"{record.kind} {record.key}: a finished shard was made again: {shards}"
        )
        again = sum(count - 1 for count in steps.values())
        assert again <= save_every_steps * max(0, starts - 1), (
            f"{record.kind} {record.key}: {again} steps again in {starts} starts: {steps}"
        )
        restarts += max(0, starts - 1)
    assert restarts <= kills


def assert_tidy(store: Store) -> None:
    litter = [
        path
        for path in store.root.joinpath("artifacts").rglob("*")
        if ".tmp-" in path.name or path.name in ("resume", ".export")
    ]
    assert not litter
    assert not [path for path in store.root.joinpath("artifacts").glob("*/*") if not (path / "record.json").is_file()]
    for path in store.root.joinpath("locks").iterdir():
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if anyone still holds it


@pytest.mark.parametrize("kills", [FEW_KILLS, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(undisturbed, tools, tmp_path, kills):
    wanted = tools.table_of(undisturbed.store, "tiny")

    def check(directory: Path, kills_in_store: int) -> None:
        store = Store(directory)
        assert tools.table_of(directory, "tiny") == wanted
        assert not [problem for record in store.records() for problem in store.problems(record, deep=True)]
        assert_same_artifacts(store, Store(undisturbed.store))
        assert_little_was_done_twice(store, kills_in_store, save_every_steps=1)
        assert_tidy(store)

    kill_often(tools, undisturbed.config, tmp_path, undisturbed.first.seconds / 14, check, kills)


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing_with_vllm(make_run, tools, tmp_path):
    pytest.importorskip("vllm")
    config = make_run("engine", sampling={"backend": {"name": "vllm"}, "runtime": {"prompts_per_shard": 3}})
    calm = tools.play(config, tmp_path / "calm")
    assert calm.code == 0, calm.out

    def check(directory: Path, kills: int) -> None:
        assert tools.table_of(directory, "engine") == tools.table_of(tmp_path / "calm", "engine")
        assert_same_artifacts(Store(directory), Store(tmp_path / "calm"))
        assert_little_was_done_twice(Store(directory), kills, save_every_steps=1)
        assert_tidy(Store(directory))

    kill_often(tools, config, tmp_path, calm.seconds / 14, check)
