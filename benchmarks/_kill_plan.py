"""Shared by `kills`: which moments of a run are struck, with what, and what happens in between; a seed decides it all."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import NamedTuple

from benchmarks._kill_kinds import Kind
from benchmarks._kill_watch import FileEvent
from data_contracts.artifact import RECORD

SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 2, signal.SIGINT: 2, signal.SIGHUP: 1, signal.SIGSTOP: 1}
"""Signal -> how often, relative to the others."""
TARGETS = {"flow": 4, "all": 3, "stage": 2, "any": 2, "supervisor": 1, "forkserver": 1}
DELAYS = (0.0, 0.0, 0.0, 0.002, 0.02, 0.1, 0.5)
"""Seconds between the event and the signal."""


class Baseline(NamedTuple):
    """What an undisturbed play left, and how it went."""

    store: Path
    events: list[FileEvent]
    seconds: float
    begun: int
    """Artifacts that were there before."""


class Kill(NamedTuple):
    """A signal at a moment."""

    event: FileEvent | None
    """None: `seconds` after the start."""
    occurrence: int
    seconds: float
    """After the event, or after the start."""
    number: int
    target: str
    choice: float
    """Which of several processes, from 0 to 1."""

    def __str__(self) -> str:
        when = f"{self.seconds:.1f} s after the start"
        if self.event is not None:
            when = f"{self.event} ({self.occurrence})" + f" + {self.seconds:g} s" * (self.seconds > 0)
        return f"{signal.Signals(self.number).name} to {self.target} at {when}"


class Strike(NamedTuple):
    """One store, struck until its command may finish."""

    kind: str
    begun: int
    """Artifacts that are there at the start."""
    kills: list[Kill]
    by_name: bool
    """Whether the run goes on by `selfplay resume`."""
    at_once: bool
    """Whether it is started again before the old processes are gone."""
    moves: bool
    """Whether the store moves in between."""


def choose(rng: random.Random, kind: Kind, baseline: Baseline) -> Strike:
    """Return the next strike of a kind."""
    records = [number for number, event in enumerate(baseline.events) if _is_signature(event)]
    begun = baseline.begun
    if kind.is_partial and rng.random() < 0.8:
        begun += max(rng.randrange(len(records)), rng.randrange(len(records)))  # late ones take less time
    position = 0
    if begun > baseline.begun:
        position = records[begun - baseline.begun - 1] + 1
        # What a build tidies away after its signature is not there in an artifact that is found.
        while position < len(baseline.events) and baseline.events[position].deed == "deleted":
            position += 1
    kills = []
    for _ in range(rng.choice((1, 2, 3, 3, 4))):
        kill, position = _choose_kill(rng, kind, baseline, position)
        kills.append(kill)
    has_run = kind.words[0] == "run" and len(kind.words) == 2
    return Strike(
        kind.name, begun, kills, has_run and rng.random() < 0.4, rng.random() < 0.3,
        kind.after == "" and kind.is_partial and kind.name != "mirror" and rng.random() < 0.15,
    )  # fmt: skip


def _is_signature(event: FileEvent) -> bool:
    return event.name.endswith(f"/{RECORD}") and event.name.startswith("artifacts/") and event.deed == "renamed"


def _choose_kill(rng: random.Random, kind: Kind, baseline: Baseline, position: int) -> tuple[Kill, int]:
    """Return a kill, and the event from which a second one may follow. Each name of a file is as likely as any other."""
    number = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    delays = DELAYS
    targets = TARGETS | ({"rank": 6} if kind.name == "ranks" else {}) | ({"server": 6} if kind.own_server else {})
    if kind.words[0] in ("gc", "report", "data"):
        targets, delays = {"flow": 1}, DELAYS[:5]  # they are over before the longer ones
    target = rng.choices(list(targets), list(targets.values()))[0]
    coming = baseline.events[position:]
    share = 1 - position / max(1, len(baseline.events))
    if not coming or rng.random() < 0.2:
        return Kill(None, 1, rng.uniform(0.1, 1.0) * baseline.seconds * share, number, target, rng.random()), position
    event = rng.choice(sorted(set(coming)))
    places = [index for index, other in enumerate(coming) if other == event]
    occurrence = rng.randrange(len(places))
    # What is built is not built again: a later kill of the same event counts from where this one struck.
    return Kill(event, occurrence + 1, rng.choice(delays), number, target, rng.random()), position + places[occurrence]
