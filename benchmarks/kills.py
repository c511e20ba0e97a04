"""Benchmark - whole runs of many kinds, killed at chosen moments and started again, against undisturbed ones.

    python -m benchmarks.kills [--count 60] [--seed 0] [--only KIND ...] [--json FILE] [--keep DIR]
    python -m benchmarks.kills --smoke

Each kind of run or command (_kill_kinds.py) is played once undisturbed, and its file events are written down. A strike
begins with an empty store or with some of the artifacts, starts the command and waits for one of these events (a record
about to be renamed, a claim, a link, a row for MLflow) or for a number of seconds; then it sends a signal to the run, its stage, a
supervisor, a rank, its server, one process or all of them. The command is started again, maybe struck again, maybe
before the old processes are gone, maybe after the store has moved; at last it may finish. Then the store is compared
with the undisturbed one file by file (_kill_compare.py), and no process may be left. All choices follow from the seed.

Exit code 1 if anything was lost, doubled, hung or left behind; tests/test_kills.py plants each of them. With `--smoke`
a few kills of `selfplay gc` on a store without models.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks._kill_compare import mirror_problems, problems
from benchmarks._kill_kinds import Kind, copy_store, keep_first, kinds, smoke_kinds, words_of
from benchmarks._kill_plan import Baseline, Kill, Strike, choose
from benchmarks._kill_watch import (
    FileEvent,
    Play,
    Watch,
    prefect_server_apart,
    start_anew,
    start_forked,
    warm_up,
)
from benchmarks._smoke import ROOT, add_smoke
from data_contracts.artifact import RECORD
from data_contracts.errors import TransientError

PAUSE_SECONDS = 5.0
"""How long a process is stopped: longer than a lease of the kind `leases`."""
HANG_SECONDS = 420.0
"""A play that takes longer hangs, unless the undisturbed one took a sixth of its time on a machine as busy."""
UNDISTURBED_SECONDS = 3600.0


class Outcome(NamedTuple):
    strike: Strike
    struck: list[str]
    """The kills that hit a living process."""
    problems: list[str]
    seconds: float


class Harness:
    """Plays and strikes in one directory."""

    def __init__(self, work: Path, smoke: bool = False):
        self.work, self.kinds = work, smoke_kinds() if smoke else kinds(work)
        self.baselines: dict[str, Baseline] = {}
        self.number = 0

    def begin(self, kind: Kind, store: Path, count: int | None = None) -> None:
        """Make the store that a kind begins with, or one that has its first `count` artifacts."""
        if count is not None and kind.is_partial and (count or kind.after):
            copy_store(self.baseline(kind.name).store, store)
            keep_first(store, count)
            shutil.copy(self.work / "warm-up" / "mlflow.db", store)  # its making is struck where there is no artifact
            return
        if kind.after:
            copy_store(self.baseline(kind.after).store, store)
        kind.prepare(store)

    def environment(self, kind: Kind, store: Path) -> dict[str, str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment |= {name: value.format(store=store) for name, value in kind.environment.items()}
        if kind.own_server:
            environment = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
        return environment

    def start(self, kind: Kind, store: Path, log: Path, resume: str = "") -> Play:
        marker = f"SELFPLAY_KILLS={self.work.name}-{self.number}"
        words = words_of(kind, self.work, store, resume)
        begin = partial(start_forked, words, log, ROOT)
        if kind.program:
            begin = partial(start_anew, [sys.executable, *kind.program, *words], log, ROOT)
        return Play(begin, self.environment(kind, store), marker)

    def baseline(self, name: str) -> Baseline:
        """Return the undisturbed play that a kind is compared with, played at its first use."""
        name = self.kinds[name].like or name
        if name in self.baselines:
            return self.baselines[name]
        kind, directory = self.kinds[name], self.work / f"{name}-undisturbed"
        store = directory / "store"
        directory.mkdir()
        self.begin(kind, store)
        store.mkdir(exist_ok=True)
        begun = len(list(store.glob(f"artifacts/*/*/{RECORD}")))
        self.number += 1
        events: list[FileEvent] = []
        with Watch(store) as watch:
            play = self.start(kind, store, directory / "log")
            while not play.has_ended(0):
                events += watch.read(0.2)
                if time.monotonic() - play.began > UNDISTURBED_SECONDS:
                    break
            events += watch.read(0)
        seconds = time.monotonic() - play.began
        remaining = play.remaining()
        if play.code or remaining:
            raise SystemExit(f"the undisturbed {name} ended with {play.code}, {remaining}:\n{_tail(directory)}")
        self.baselines[name] = Baseline(store, events, seconds, begun)
        return self.baselines[name]

    def strike(self, strike: Strike) -> Outcome:
        """Play a strike to its end and compare."""
        kind, baseline = self.kinds[strike.kind], self.baseline(strike.kind)
        self.number += 1
        directory = self.work / f"{strike.kind}-{self.number:03d}"
        store, log, began = directory / "store", directory / "log", time.monotonic()
        directory.mkdir()
        self.begin(kind, store, strike.begun)
        store.mkdir(exist_ok=True)
        struck: list[str] = []
        sentences: list[str] = []
        code, sessions, play = None, 0, None
        for kill in [*strike.kills, None, None, None]:
            resume = self._name_of(kind, store) if strike.by_name and sessions else ""
            play = self.start(kind, store, log, resume)
            sessions += 1
            sentences += self._play(play, kill, store, struck, max(HANG_SECONDS, 6 * baseline.seconds))
            code = play.code
            if code in kind.done:
                break
            if kill is None and code != TransientError.exit_code:  # which says: start it again
                sentences.append(f"the command ended with {code} although nobody struck it: {_tail(directory)}")
            if not strike.at_once or strike.moves:
                sentences += [f"process left behind: {process}" for process in play.remaining()]
            if strike.moves and store.name == "store":
                store = store.rename(directory / "moved")
        assert play is not None
        sentences += [f"process left behind: {process}" for process in play.remaining()]
        if code not in kind.done:
            sentences.append(f"it never ended well: {code}")
        if strike.moves and store.name == "moved" and (directory / "store").exists():
            sentences.append(f"left behind: the old store, with {sorted((directory / 'store').rglob('*'))[:5]}")
        sentences += problems(baseline.store, store, sessions)
        if "SELFPLAY_MIRROR" in kind.environment:
            sentences += mirror_problems(store, store.with_name("store-mirrored"))
        return Outcome(strike, struck, sentences, time.monotonic() - began)

    def _name_of(self, kind: Kind, store: Path) -> str:
        """Return the name under which the run can be resumed, "" while it has none."""
        return next((path.parent.name for path in store.glob("runs/*/run.json")), "")

    def _play(self, play: Play, kill: Kill | None, store: Path, struck: list[str], limit: float) -> list[str]:
        """Wait for the moment of a kill, strike, and wait for the end. Returns what went wrong."""
        waiting = kill
        occurrences = 0
        with Watch(store) as watch:
            while not play.has_ended(0):
                if time.monotonic() - play.began > limit:
                    living = play.processes()
                    play.remaining(0)
                    play.has_ended(10)
                    return [f"hung for {limit:.0f} s: {living}"]
                if waiting is None:
                    play.has_ended(0.2)
                    continue
                for event in watch.read(0.02):
                    occurrences += event == waiting.event
                is_due = waiting.event is None and time.monotonic() - play.began >= waiting.seconds
                is_due |= waiting.event is not None and occurrences >= waiting.occurrence
                if is_due and self._deliver(play, waiting):
                    struck.append(str(waiting))
                    waiting = None
        return []

    def _deliver(self, play: Play, kill: Kill) -> bool:
        """Send the signal; returns whether there was a process to send it to."""
        if kill.event is not None:
            time.sleep(kill.seconds)
        if kill.target == "flow":
            pids = [play.pid]
        else:
            processes = play.processes()
            if kill.target not in ("all", "any"):
                processes = [process for process in processes if process.role == kill.target]
            pids = [process.pid for process in processes]
            if kill.target != "all" and pids:
                pids = [pids[int(kill.choice * len(pids))] if kill.target == "any" else pids[-1]]
        if play.has_ended(0) or not pids:
            return False
        play.strike(kill.number, pids, PAUSE_SECONDS)
        return True


def _tail(directory: Path) -> str:
    text = (directory / "log").read_text(encoding="utf-8", errors="replace")
    return " / ".join(text.splitlines()[-6:])[-1500:]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="kills that hit a living process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds that are struck; default: all")
    parser.add_argument("--json", type=Path, help="append one line per strike to this file")
    parser.add_argument("--keep", type=Path, help="work in this directory, and leave the stores there")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would plays
    work = options.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        return _run(options, work)
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)


def _run(options: argparse.Namespace, work: Path) -> int:
    harness, rng = Harness(work, options.smoke), random.Random(options.seed)
    names = tuple(options.only or harness.kinds)
    count = 2 if options.smoke else options.count
    outcomes: list[Outcome] = []
    with prefect_server_apart(work / "prefect") if not options.smoke else nullcontext():
        if not options.smoke:
            warm_up(work / "kto.yaml", work / "warm-up")
        hits = 0
        while hits < count:
            outcome = _next(harness, rng, names, outcomes)
            outcomes.append(outcome)
            hits += len(outcome.struck)
            _show(outcome, hits)
            if options.json:
                with open(options.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome._asdict() | {"strike": str(outcome.strike)}) + "\n")
    by_kind = Counter(dict.fromkeys(names, 0))
    for outcome in outcomes:
        by_kind[outcome.strike.kind] += len(outcome.struck)
    wrong = [outcome for outcome in outcomes if outcome.problems]
    print(", ".join(f"{name} {number}" for name, number in by_kind.items()))
    print(f"{hits} kills in {len(outcomes)} plays, {len(wrong)} of them lost, doubled, hung or left something behind")
    return int(bool(wrong))


def _next(harness: Harness, rng: random.Random, names: tuple[str, ...], outcomes: list[Outcome]) -> Outcome:
    """Strike the kind that has had the least, by its cost."""
    spent = Counter[str]()
    for outcome in outcomes:
        spent[outcome.strike.kind] += 1
    name = min(names, key=lambda name: (spent[name] * harness.kinds[name].cost, names.index(name)))
    strike = choose(rng, harness.kinds[name], harness.baseline(name))
    return harness.strike(strike)


def _show(outcome: Outcome, hits: int) -> None:
    strike = outcome.strike
    ways = [
        word
        for word, is_so in (("resumed by name", strike.by_name), ("at once", strike.at_once), ("moved", strike.moves))
        if is_so
    ]
    print(
        f"{hits:3d}  {strike.kind} from {strike.begun} artifacts{', ' * bool(ways)}{', '.join(ways)}, "
        f"{outcome.seconds:.0f} s: {'; '.join(outcome.struck) or 'came too late'}",
        flush=True,
    )
    for sentence in outcome.problems:
        print(f"     {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
