"""Contracts - the ledger of a run: what each stage took and gave, what was found instead of made, and what is left over.

    <root>/runs/<run>/ledger.jsonl      one line per event: a session begins, a stage starts, a stage is there, the session ends

Costs are in the records; a line only says which artifact, when, and whether it was found. A session is one process that played the run: a
run that was killed and started again has several. What no stage accounts for (the flow's own imports, the server, reports) is `other`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.artifact import ArtifactRecord
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.store import Store

FILE, ESTIMATE = "ledger.jsonl", "estimate.json"
ALWAYS = {"event", "session", "time"}
FIELDS = {
    "started": ALWAYS | {"step", "shown_as"},
    "stage": ALWAYS | {"step", "shown_as", "stage", "kind", "key", "cached", "began", "waited"},
}
"""What a line must have to be read, by its event."""
SUMMED = (
    "wall",
    "start_up",
    "busy",
    "waiting",
    "saved",
    "tokens_in",
    "tokens_out",
    "flops",
    "cpu_seconds",
    "bytes",
    "cache_hits",
)
LARGEST = ("peak_rss_bytes", "peak_gpu_bytes", "gpus")


class Ledger:
    """Writes the lines of one session."""

    def __init__(self, store: Store, run: str, session: str | None = None):
        self.path = store.run_directory(run) / FILE
        self.session = session or uuid.uuid4().hex[:12]

    def begin(self, launched: float | None = None) -> None:
        """`launched`: when the process began, so that its imports are counted; None: now."""
        self._write("begin", launched=launched or time.time(), pid=os.getpid(), host=os.uname().nodename)

    def started(self, step: str, shown_as: str, stage: str) -> None:
        self._write("started", step=step, shown_as=shown_as, stage=stage)

    def finished(
        self, step: str, shown_as: str, stage: str, record: ArtifactRecord, cached: bool, began: float, waited: float
    ) -> None:  # fmt: skip
        """`began`: when the stage was asked for; `waited`: seconds until nobody else was building it."""
        self._write(
            "stage",
            step=step,
            shown_as=shown_as,
            stage=stage,
            kind=record.kind,
            key=record.key,
            cached=cached,
            began=began,
            waited=waited,
        )

    def end(self) -> None:
        """May be said again, later: the last one counts."""
        self._write("end")

    def _write(self, event: str, **values: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "session": self.session, "time": time.time(), **values}) + "\n"
        # One write of one line, appended: two sessions at once do not mix, and a kill cuts at most the last line.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


class Entry(NamedTuple):
    """A stage's artifact in one session."""

    session: str
    step: str
    shown_as: str
    stage: str
    key: str
    cached: bool
    seconds: float
    """That this session spent on it: launch, work, waiting, or the look that found it."""
    waited: float
    record: ArtifactRecord | None
    """None: it was removed since."""

    def costs(self) -> dict[str, float]:
        """What this run paid for it, all tries together; a found artifact cost nothing and saved what it once cost."""
        seconds = self.record.seconds if self.record else {"wall": self.seconds}
        if self.cached:
            return {"saved": seconds.get("wall", 0.0), "waiting": self.waited, "wall": self.waited}
        own = {name: seconds.get(name, 0.0) for name in ("wall", "start_up", "busy", "waiting")}
        own["waiting"] += self.waited
        own["wall"] += self.waited
        return own | (self.record.cost | {"bytes": sum(file.size for file in self.record.files)} if self.record else {})


class Session(NamedTuple):
    session: str
    began: float
    ended: float
    is_finished: bool
    stages: float
    """Seconds that its stages account for."""

    @property
    def wall(self) -> float:
        return self.ended - self.began

    @property
    def other(self) -> float:
        return self.wall - self.stages


class Account(NamedTuple):
    run: str
    entries: list[Entry]
    sessions: list[Session]
    running: list[dict[str, Any]]
    """`started` lines of the last session without a `stage` line: what it is at, or was at when it was killed."""


def read(store: Store, run: str) -> Account:
    """Raises: ConfigError for a run without a ledger, or with one that holds nothing yet."""
    known = store.runs_with(FILE)
    if run not in known:
        raise ConfigError(
            f"no run {run!r} in {store.root} (none with a {FILE}); runs there: {', '.join(known) or 'none'}"
        )
    lines = _lines(store.run_directory(run) / FILE)
    if not lines:
        raise ConfigError(
            f"the ledger of {run!r} in {store.root} has no whole line: the run was ended as it began. Start it again"
        )
    entries, open_lines = [], {}
    for line in lines:
        at = (line["session"], line.get("step"), line.get("shown_as"))
        if line["event"] == "started":
            open_lines[at] = line
        elif line["event"] == "stage":
            open_lines.pop(at, None)
            entries.append(
                Entry(
                    line["session"], line["step"], line["shown_as"], line["stage"], line["key"], line["cached"],
                    line["time"] - line["began"], line["waited"], _record(store, line["kind"], line["key"]),
                )
            )  # fmt: skip
    sessions = []
    for name in dict.fromkeys(line["session"] for line in lines):
        own = [line for line in lines if line["session"] == name]
        spent = sum(entry.seconds for entry in entries if entry.session == name)
        began = own[0].get("launched", own[0]["time"])
        sessions.append(Session(name, began, own[-1]["time"], own[-1]["event"] == "end", spent))
    last = sessions[-1].session
    return Account(run, entries, sessions, [line for (session, *_), line in open_lines.items() if session == last])


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # cut by a kill, or damaged
            one = json.loads(line)
            if isinstance(one, dict) and FIELDS.get(str(one.get("event")), ALWAYS) <= one.keys():
                found.append(one)
    return found


def _record(store: Store, kind: str, key: str) -> ArtifactRecord | None:
    try:
        return store.load(kind, key)
    except ArtifactError:
        return None


def rows(account: Account) -> list[dict[str, Any]]:
    """One row per artifact: paid for by this run (by whichever session), else saved; in the order of the run."""
    best: dict[tuple[str, str], Entry] = {}
    for entry in account.entries:
        at = (entry.step, entry.shown_as)
        before = best.get(at)
        # A later session finds what an earlier one made: still paid for, once. Another key at the same place: the config was changed.
        if before is None or before.key != entry.key or before.cached:
            best[at] = entry
    order = sorted(best.values(), key=lambda entry: entry.step)
    return [
        {"step": one.step, "stage": one.stage, "shown_as": one.shown_as, "key": one.key, "cached": one.cached}
        | one.costs()
        for one in order
    ]


def predicted(store: Store, run: str) -> list[str]:
    """Lines that set `selfplay estimate`'s last prediction beside what was measured; none without one.

    Compared are the artifacts that the estimate had to predict and that this run has built since.
    """
    path = store.run_directory(run) / ESTIMATE
    if not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8"))
    account = read(store, run)
    measured = {(row["step"], row["shown_as"]): row["wall"] for row in rows(account) if not row["cached"]}
    pairs = [
        (one["seconds"], measured[one["step"], one["shown_as"]])
        for one in said["steps"]
        if one["source"] != "built" and (one["step"], one["shown_as"]) in measured
    ]
    lines = []
    if pairs:
        foreseen, took = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        lines.append(
            f"predicted for these {len(pairs)} stages: {foreseen:.1f} s, measured {took:.1f} s ({foreseen / took - 1:+.0%})"
        )
    if len(account.sessions) == 1 and account.sessions[0].is_finished:
        wall = account.sessions[0].wall
        lines.append(
            f"predicted for the run: {said['seconds']:.1f} s +- {said['half_width']:.1f} s, measured {wall:.1f} s ({said['seconds'] / wall - 1:+.0%})"
        )
    return lines


def total(rows: Iterable[dict[str, Any]], by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Add rows up by columns; peaks and GPU counts are the largest, not the sum."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        at = tuple(row[name] for name in by)
        group = groups.setdefault(at, dict(zip(by, at, strict=True)) | {"artifacts": 0, "found": 0})
        group["artifacts"] += 1
        group["found"] += bool(row["cached"])
        for name in SUMMED:
            group[name] = group.get(name, 0.0) + row.get(name, 0.0)
        for name in LARGEST:
            group[name] = max(group.get(name, 0.0), row.get(name, 0.0))
    return list(groups.values())


COLUMNS = {
    "wall": ("seconds", 1, ".1f"),
    "start_up": ("start-up", 1, ".1f"),
    "busy": ("busy", 1, ".1f"),
    "waiting": ("waiting", 1, ".1f"),
    "saved": ("saved s", 1, ".1f"),
    "tokens_in": ("tokens in", 1, ",.0f"),
    "tokens_out": ("tokens out", 1, ",.0f"),
    "flops": ("TFLOP", 1e12, ",.2f"),
    "cpu_seconds": ("CPU s", 1, ".1f"),
    "peak_rss_bytes": ("peak GiB", 2**30, ".2f"),
    "peak_gpu_bytes": ("GPU GiB", 2**30, ".2f"),
    "gpus": ("GPUs", 1, ".0f"),
    "bytes": ("MB written", 1e6, ",.1f"),
    "cache_hits": ("passes found", 1, ",.0f"),
}


def table(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and cells for people; a column in which nothing happened is left out."""
    shown = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    head = [*by, *(COLUMNS[name][0] for name in shown)]
    cells = [
        [str(row[name]) for name in by]
        + [format(row.get(name, 0.0) / COLUMNS[name][1], COLUMNS[name][2]) if row.get(name) else "" for name in shown]
        for row in rows
    ]
    return head, cells


def summary(account: Account) -> list[str]:
    """A line per session: its wall time, and how much of it no stage accounts for."""
    lines = []
    for number, one in enumerate(account.sessions, 1):
        ending = "" if one.is_finished else "; it was interrupted: seconds after its last word are not counted"
        share = one.other / one.wall if one.wall > 0 else 0.0
        lines.append(
            f"session {number}: {one.wall:.1f} s = stages {one.stages:.1f} s + other {one.other:.1f} s ({share:.1%}){ending}"
        )
    return lines
