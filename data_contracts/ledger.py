"""Contracts - the ledger of a run: what each stage cost, what was found instead of built, and what no stage explains.

    <root>/runs/<run>/ledger.jsonl     one line per event: a session begins, a stage starts, is built, the session ends

Costs are in the records; a line only says which artifact, when, and whether it was found. A session is one process that
played the run: a run that was killed and started again has several. What no stage accounts for (the flow's own imports,
the server, reports) is `other`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_contracts.artifact import ArtifactRecord
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.store import Store
from data_contracts.words import plural

FILE, ESTIMATE = "ledger.jsonl", "estimate.json"
SESSION = "SELFPLAY_SESSION"
"""Environment variable that the stages of a session inherit: their records name it, should the session be killed before
it can write down what they built."""
ALWAYS = frozenset({"event", "session", "time"})
FIELDS = {
    "started": ALWAYS | {"step", "shown_as"},
    "stage": ALWAYS | {"step", "shown_as", "stage", "kind", "key", "cached", "began", "waited"},
}
"""Event -> the fields that a line must have to be read."""

Line = dict[str, Any]
"""A line of the ledger; its fields depend on its event."""
CostRow = dict[str, Any]
"""One row of a table: names (step, stage, shown_as, key, cached, or a group's) and costs by the names of `Column`."""


class Ledger:
    """The writer of one session's lines."""

    def __init__(self, store: Store, run: str, session: str | None = None):
        self.path = store.run_directory(run) / FILE
        self.session = session or uuid.uuid4().hex[:12]

    def begin(self, launched: float | None = None) -> None:
        """Write that the session begins, and have its stages inherit its name.

        launched: when its process began, so that imports count; None: now
        """
        os.environ[SESSION] = self.session
        self._write("begin", launched=launched or time.time(), pid=os.getpid(), host=os.uname().nodename)

    def started(self, step: str, shown_as: str, stage: str) -> None:
        """Write that a stage was requested."""
        self._write("started", step=step, shown_as=shown_as, stage=stage)

    def finished(
        self, step: str, shown_as: str, stage: str, record: ArtifactRecord, cached: bool, began: float, waited: float
    ) -> None:  # fmt: skip
        """Write that the artifact of a stage exists.

        cached: it was found, not built
        began: when the stage was requested, in seconds since the epoch
        waited: seconds until no other process was building it
        """
        self._write("stage", step=step, shown_as=shown_as, stage=stage, kind=record.kind, key=record.key, cached=cached,
                    began=began, waited=waited)  # fmt: skip

    def end(self) -> None:
        """Write that the session ends. May be called again later: the last line counts."""
        self._write("end")

    def _write(self, event: str, **values: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "session": self.session, "time": time.time(), **values}) + "\n"
        # One appending write per line: lines of two sessions do not mix, and a kill cuts at most the last line.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


class Entry(NamedTuple):
    """The artifact of a stage in one session."""

    session: str
    step: str
    shown_as: str
    stage: str
    key: str
    cached: bool
    seconds: float
    """What this session spent on it: launch, work and waiting, or the look that found it."""
    waited: float
    record: ArtifactRecord | None
    """None: the artifact was removed since."""

    def costs(self) -> dict[str, float]:
        """Return what this run paid for the artifact, all tries together.

        An artifact that was found cost nothing but the wait, and saved what it once cost.
        """
        seconds = self.record.seconds if self.record else {"wall": self.seconds}
        if self.cached:
            return {"saved": seconds.get("wall", 0.0), "waiting": self.waited, "wall": self.waited}
        costs = {name: seconds.get(name, 0.0) for name in ("wall", "start_up", "busy", "waiting")}
        costs["waiting"] += self.waited
        costs["wall"] += self.waited
        if self.record:
            costs |= self.record.cost
            costs["bytes"] = sum(file.size for file in self.record.files)
        return costs


class Session(NamedTuple):
    """One process that played the run."""

    session: str
    began: float
    ended: float
    is_finished: bool
    stage_seconds: float
    """Seconds that its stages account for."""

    @property
    def wall_seconds(self) -> float:
        return self.ended - self.began

    @property
    def other_seconds(self) -> float:
        return self.wall_seconds - self.stage_seconds


class Account(NamedTuple):
    """A ledger that was read."""

    run: str
    entries: list[Entry]
    sessions: list[Session]
    running: list[Line]
    """`started` lines of the last session that no `stage` line follows: what it does now, or did when it was killed."""


def read_account(store: Store, run: str) -> Account:
    """Return what the ledger of a run says. Raises: ConfigError if the run has none, or one without a whole line."""
    runs = store.runs_with(FILE)
    if run not in runs:
        raise ConfigError(
            f"no run {run!r} in {store.root} (none with a {FILE}); runs there: {', '.join(runs) or 'none'}"
        )
    lines = _read_lines(store.run_directory(run) / FILE)
    if not lines:
        raise ConfigError(
            f"the ledger of {run!r} in {store.root} has no whole line: the run was ended as it began. Start it again"
        )
    entries: list[Entry] = []
    open_lines: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        position = (line["session"], line.get("step", ""), line.get("shown_as", ""))
        if line["event"] == "started":
            open_lines[position] = line
        elif line["event"] == "stage":
            open_lines.pop(position, None)
            entries.append(_entry(store, line))
    entries = _with_unwritten_builds(entries, {line["session"] for line in lines})
    sessions = [_session(name, lines, entries) for name in dict.fromkeys(line["session"] for line in lines)]
    running = [line for line in open_lines.values() if line["session"] == sessions[-1].session]
    return Account(run, entries, sessions, running)


def _with_unwritten_builds(entries: list[Entry], sessions: set[str]) -> list[Entry]:
    """Return the entries, those as built which a session of this run built and was killed before it wrote so."""
    written = {entry.key for entry in entries if not entry.cached}
    corrected: list[Entry] = []
    for entry in entries:
        if entry.key not in written and entry.record and entry.record.provenance.get("session") in sessions:
            written.add(entry.key)
            entry = entry._replace(cached=False)
        corrected.append(entry)
    return corrected


def _read_lines(path: Path) -> list[Line]:
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # cut by a kill, or damaged
            value: Any = json.loads(text)
            if isinstance(value, dict):
                line = cast(Line, value)
                if FIELDS.get(str(line.get("event")), ALWAYS) <= line.keys():
                    lines.append(line)
    return lines


def _entry(store: Store, line: Line) -> Entry:
    try:
        record = store.load(line["kind"], line["key"])
    except ArtifactError:
        record = None
    return Entry(
        session=line["session"], step=line["step"], shown_as=line["shown_as"], stage=line["stage"], key=line["key"],
        cached=line["cached"], seconds=line["time"] - line["began"], waited=line["waited"], record=record,
    )  # fmt: skip


def _session(name: str, lines: list[Line], entries: list[Entry]) -> Session:
    session_lines = [line for line in lines if line["session"] == name]
    first, last = session_lines[0], session_lines[-1]
    stage_seconds = sum(entry.seconds for entry in entries if entry.session == name)
    return Session(name, first.get("launched", first["time"]), last["time"], last["event"] == "end", stage_seconds)


def cost_rows(account: Account) -> list[CostRow]:
    """Return one row per artifact, in the order of the run.

    The row says what the artifact cost if any session of this run built it, else what finding it saved.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for entry in account.entries:
        position = (entry.step, entry.shown_as)
        earlier = entries.get(position)
        # A later session finds what an earlier one built: it was paid for, once. Another key at the same position means
        # that the config was changed.
        if earlier is None or earlier.key != entry.key or earlier.cached:
            entries[position] = entry
    return [
        {"step": entry.step, "stage": entry.stage, "shown_as": entry.shown_as, "key": entry.key, "cached": entry.cached}
        | entry.costs()
        for entry in sorted(entries.values(), key=lambda entry: entry.step)
    ]


class Column(NamedTuple):
    """How a cost is added up and shown."""

    title: str
    unit: float = 1
    """What one of the shown unit is in the record's: 2**30 bytes to a GiB."""
    form: str = ".1f"
    is_sum: bool = True
    """False: the largest value of a group counts."""


COLUMNS = {
    "wall": Column("seconds"),
    "start_up": Column("start-up"),
    "busy": Column("busy"),
    "waiting": Column("waiting"),
    "saved": Column("saved s"),
    "tokens_in": Column("tokens in", form=",.0f"),
    "tokens_out": Column("tokens out", form=",.0f"),
    "flops": Column("TFLOP", 1e12, ",.2f"),
    "tokens_per_second": Column("trained tokens/s", form=",.0f", is_sum=False),
    "mfu": Column("MFU", form=".1%", is_sum=False),
    "cpu_seconds": Column("CPU s"),
    "peak_rss_bytes": Column("peak GiB", 2**30, ".2f", is_sum=False),
    "peak_gpu_bytes": Column("GPU GiB", 2**30, ".2f", is_sum=False),
    "gpus": Column("GPUs", form=".0f", is_sum=False),
    "bytes": Column("MB written", 1e6, ",.1f"),
    "cache_hits": Column("passes found", form=",.0f"),
}


def sum_rows(rows: Iterable[CostRow], by: Sequence[str] = ()) -> list[CostRow]:
    """Return one row per group of rows that are equal in the columns `by`, in the order of their first rows.

    Costs are added up; of peaks and numbers of GPUs the largest counts.
    """
    groups: dict[tuple[Any, ...], CostRow] = {}
    for row in rows:
        names = tuple(row[name] for name in by)
        group = groups.setdefault(names, dict(zip(by, names, strict=True)) | {"artifacts": 0, "found": 0})
        group["artifacts"] += 1
        group["found"] += bool(row["cached"])
        for name, column in COLUMNS.items():
            value, so_far = row.get(name, 0.0), group.get(name, 0.0)
            group[name] = so_far + value if column.is_sum else max(so_far, value)
    return list(groups.values())


def format_table(rows: Sequence[CostRow], by: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells for people; a column that is zero in every row is left out."""
    columns = {name: column for name, column in COLUMNS.items() if any(row.get(name) for row in rows)}
    titles = [*by, *(column.title for column in columns.values())]
    cells = [
        [str(row[name]) for name in by] + [_format_cost(row.get(name), column) for name, column in columns.items()]
        for row in rows
    ]
    return titles, cells


def _format_cost(value: float | None, column: Column) -> str:
    if value:
        return format(value / column.unit, column.form)
    return ""


def session_lines(account: Account) -> list[str]:
    """Return a line per session: its wall time, and how much of it no stage accounts for."""
    lines: list[str] = []
    for number, session in enumerate(account.sessions, 1):
        share = session.other_seconds / session.wall_seconds if session.wall_seconds > 0 else 0.0
        ending = "" if session.is_finished else "; it was interrupted: the time after its last line is not counted"
        lines.append(
            f"session {number}: {session.wall_seconds:.1f} s = stages {session.stage_seconds:.1f} s "
            f"+ other {session.other_seconds:.1f} s ({share:.1%}){ending}"
        )
    return lines


def estimate_lines(store: Store, run: str) -> list[str]:
    """Return lines that set the last prediction of `selfplay estimate` beside what was measured; [] without one.

    Compared are the artifacts that the estimate had to predict and that this run has built since.
    """
    path = store.run_directory(run) / ESTIMATE
    if not path.is_file():
        return []
    try:
        estimate = json.loads(path.read_text(encoding="utf-8"))
        predicted = [
            (step["step"], step["shown_as"], step["source"], float(step["seconds"])) for step in estimate["steps"]
        ]
        whole, half_width = float(estimate["seconds"]), float(estimate["half_width"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{path} is damaged ({type(error).__name__}): no comparison with the estimate. Delete it"]
    account = read_account(store, run)
    measured = {(row["step"], row["shown_as"]): row["wall"] for row in cost_rows(account) if not row["cached"]}
    pairs = [
        (seconds, measured[step, shown_as])
        for step, shown_as, source, seconds in predicted
        if source != "built" and (step, shown_as) in measured
    ]
    lines: list[str] = []
    if pairs:
        predicted_seconds, seconds = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        lines.append(
            f"predicted for {plural(len(pairs), 'stage')}: {predicted_seconds:.1f} s, measured {seconds:.1f} s "
            f"({predicted_seconds / seconds - 1:+.0%})"
        )
    if len(account.sessions) == 1 and account.sessions[0].is_finished:
        seconds = account.sessions[0].wall_seconds
        lines.append(
            f"predicted for the run: {whole:.1f} s +- {half_width:.1f} s, "
            f"measured {seconds:.1f} s ({whole / seconds - 1:+.0%})"
        )
    return lines
