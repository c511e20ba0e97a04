"""Flows - ask about a run: what of it is there (`status`), and its report again (`report`). Nothing is built."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.lease import LockOwner
from data_contracts.redaction import redact
from data_contracts.set_aside import SET_ASIDE, list_set_aside
from data_contracts.store import Store
from data_contracts.words import format_bytes, plural
from flows.cli.finished import read_run
from flows.config import RunConfig
from flows.forecast.rehearsal import Step, rehearse
from flows.report.overlay import LaidRun, not_comparable, overlay
from flows.report.page import render_comparison
from stages.running.history import events
from stages.stage import STAGES

LONGEST_NAME = 200
"""Characters of the name of a page about several runs."""


def status(config: RunConfig, store: Store) -> str:
    """A line per artifact of the run, and what is left."""
    rehearsal = rehearse(config, store)
    locked = store.lock_names()
    lines = [f"run {config.name}: {config.method.name}, {plural(config.iterations, 'iteration')}, store {store.root}"]
    for step in rehearsal.steps:
        lines.append(f"  {step.place.step}  {step.name:20} {step.key or '':16}  {_state(step, store, locked)}")
    built = sum(step.record is not None for step in rehearsal.steps)
    lines.append(
        f"{built} of {len(rehearsal.steps)} artifacts are built"
        + ("" if built < len(rehearsal.steps) else ": the run is complete")
    )
    lines += _set_aside_lines(store)
    return "\n".join(lines)


def _set_aside_lines(store: Store) -> list[str]:
    """A line per directory that was set aside in the store, whichever run it was of, with the reason."""
    entries = list_set_aside(store.root)
    lines = [
        f"  {path.name}  was {reason['was']}, {format_bytes(reason['size'])}, by {reason['by']}: {reason['why']}"
        for path, reason in entries
    ]
    if entries:
        return [f"set aside in {store.root / SET_ASIDE}:", *lines]
    return []


def _state(step: Step, store: Store, locked: list[tuple[str, str]]) -> str:
    """Return whether the step's artifact is built, being built, begun, next or to come, in words."""
    if step.record is not None:
        time_built = str(step.record.provenance.get("time", "?"))[:19].replace("T", " ")
        return f"built {time_built}, {step.record.seconds.get('wall', 0):.1f} s"
    if step.key is None:
        return "to come"
    kind = STAGES[step.stage].produces
    owner = _owner(store, kind, step.key, locked)
    history = events(store.directory(kind, step.key))
    num_shards = sum(event["event"] == "shard" for event in history)
    steps = max((event["index"] for event in history if event["event"] == "step"), default=0)
    progress = f"{steps} training step(s)" if steps else f"{num_shards} shard(s)"
    if owner is not None:
        return f"being built by {owner}: {progress}"
    if history:
        ago = time.time() - history[-1]["time"]
        return f"unfinished: {progress}, last word {ago / 60:.0f} min ago; the next run goes on from there"
    return "next"


def _owner(store: Store, kind: str, key: str, locked: list[tuple[str, str]]) -> LockOwner | None:
    """Who builds it, on whatever host.

    Holding the lock for a moment to see is harmless: a builder asks again every half second.
    """
    if (kind, key) not in locked:  # to ask for a lock makes its file
        return None
    with store.try_lock(kind, key) as owner:
        return owner


def report_again(config: RunConfig, store: Store) -> Path:
    """Write `runs/<name>/report.html` and `.md` from the complete iterations, and return the page.

    Raises: ConfigError if no iteration is complete, or if nothing can be written there.
    """
    with _write_errors_explained(config.name, store):
        return read_run(config, store).history.write_report()


def report_over_each_other(configs: Sequence[RunConfig], store: Store) -> Path:
    """Write the report of each run again, and `runs/<first>/against-<others>.html`: all runs in one page, returned.

    Raises: ConfigError for fewer than two runs, and as `report_again`.
    """
    names = [config.name for config in configs]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(f"--compare lays different runs over each other, got {', '.join(names)}: name two or more")
    histories = [read_run(config, store).history for config in configs]
    runs = []
    for config, history in zip(configs, histories, strict=True):
        runs.append(LaidRun(config.name, history.story(), config, f"../{config.name}/report.html"))
    if warning := not_comparable(runs):
        print(warning, file=sys.stderr)
    page = store.run_directory(names[0]) / f"against-{'-'.join(names[1:])[:LONGEST_NAME]}.html"
    with _write_errors_explained(names[0], store):
        for history in histories:
            history.write_report()
        write_atomic(page, redact(render_comparison(" and ".join(names), runs, overlay(runs))))
    return page


@contextmanager
def _write_errors_explained(name: str, store: Store) -> Generator[None]:
    """Raises: ConfigError in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the report of {name} cannot be written ({error.strerror}: {error.filename}): make {store.root} "
            "writable, or copy the store to a disk that is"
        ) from None
