"""Flows - what is wrong with a store: its disk, its locks, its artifacts. Reads only."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator

from data_contracts.artifact import RECORD
from data_contracts.errors import ArtifactError, NewerRecordError
from data_contracts.files import bytes_below, bytes_from_environment, process_state
from data_contracts.lease import LockOwner
from data_contracts.set_aside import list_set_aside
from data_contracts.store import MAX_BYTES, MIN_FREE_BYTES, RUN_SETTINGS, Store
from data_contracts.words import format_bytes, plural
from flows.cli.diagnosis import Finding

GIB = 1 << 30
NAMED = 3
"""Interrupted builds that are named."""


def disk(store: Store) -> Iterator[Finding]:
    """A disk that is nearly full, or a store that has nearly reached its limit. Raises: ConfigError if read-only."""
    store.check_writable()
    nearest = next(path for path in (store.root, *store.root.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    least = bytes_from_environment(MIN_FREE_BYTES, 256 << 20) or 0
    cure = f"selfplay gc --keep-runs 3 --dry-run --store {store.root}"
    room = f"the disk of {store.root} has {format_bytes(free)} left"
    if free < least:
        yield Finding("bad", f"{room}: nothing is built below {format_bytes(least)}", cure)
    elif free < 10 * GIB:
        yield Finding("note", room, cure)
    budget = bytes_from_environment(MAX_BYTES, None)
    if budget is not None and (used := bytes_below(store.root)) > 0.9 * budget:
        yield Finding(
            "bad" if used >= budget else "note",
            f"the store takes {format_bytes(used)} of its {format_bytes(budget)} ({MAX_BYTES})",
            cure,
        )


def locks(store: Store) -> Iterator[Finding]:
    """Each artifact that is being built, and whether its builder still can."""
    for kind, key in store.lock_names():
        with store.try_lock(kind, key) as owner:
            if owner is not None:
                yield _lock(store, kind, key, owner)


def _lock(store: Store, kind: str, key: str, owner: LockOwner) -> Finding:
    path = store.lock_path(kind, key)
    builder = f"{kind} {key} is being built by process {owner.pid}"
    if not owner.pid:
        return Finding("note", f"{kind} {key} is locked, and its lock does not say by whom", f"fuser -v {path}")
    if owner.host != socket.gethostname():
        message = f"{builder} on {owner.host} since {owner.since}"
        return Finding("note", message, f"ssh {owner.host} ps -fp {owner.pid}")
    state = process_state(owner.pid)
    if not state:
        message = (
            f"{kind} {key} is locked by what process {owner.pid} left behind when it was killed: its stage lives on"
        )
        return Finding("bad", message, f"fuser -v {path}, then kill the processes")
    if state in ("T", "t"):
        message = f"{kind} {key} is locked by process {owner.pid}, which is stopped: whoever wants it waits"
        return Finding("bad", message, f"kill -CONT {owner.pid}")
    return Finding("ok", f"{builder} since {owner.since}")


def artifacts(store: Store) -> Iterator[Finding]:
    """Artifacts that do not hold what was signed or that a newer program wrote, builds that were interrupted, what was
    set aside, temporary files of dead writers."""
    interrupted: list[str] = []
    for kind, key in store.artifact_names():
        directory = store.directory(kind, key)
        if not (directory / RECORD).is_file():
            with store.try_lock(kind, key) as owner:
                interrupted += [f"{kind}/{key}"] if owner is None else []
            continue
        try:
            record = store.load(kind, key)
            problems = store.problems(record) if record else []
        except NewerRecordError as error:
            message = f"{kind} {key} is newer than this program, not damaged: {error}"
            yield Finding("note", message, "update the program, or give this one another store")
            continue
        except ArtifactError as error:
            problems = [str(error)]
        if problems:
            yield Finding(
                "note",
                f"{kind} {key} is damaged ({problems[0]}): the next run that needs it makes what is missing",
                f"selfplay verify {kind}/{key}",
            )
    if interrupted:
        names = ", ".join(interrupted[:NAMED]) + (" and others" if len(interrupted) > NAMED else "")
        message = (
            f"{plural(len(interrupted), 'interrupted build')} ({names}): start its run again, and it goes on from there"
        )
        runs = store.runs_with(RUN_SETTINGS)
        yield Finding("note", message, f"selfplay resume {runs[0] if len(runs) == 1 else 'RUN'} --store {store.root}")
    for path, reason in list_set_aside(store.root):
        message = (
            f"{reason['was']} was set aside by {reason['by']} on {reason['since']}, "
            f"{format_bytes(reason['size'])}: {reason['why']}"
        )
        yield Finding("note", message, f"rm -r {path}, or move it back to {store.root / reason['was']}")
    if litter := sum(1 for _ in store.abandoned(in_artifacts=True)):
        yield Finding(
            "note", f"{plural(litter, 'temporary file')} of writers that are gone; the next build removes them"
        )
