"""python -m data_contracts.gc --keep-runs N [--dry-run | --yes] [--store DIR]: set aside what none of the last N runs needs; delete it with --yes.

Kept: every artifact that a link of a kept run leads to, and whatever its record names as an input, all the way back; work that is being
built (locked), with its inputs; unfinished work that only waits for its run to be started again; anything younger than an hour. Reports
(runs/<run>/report.md, .html) and answered judgements stay, they are small or were paid for.
Artifacts are compared by kind and key, never by path: a store reached through links, `..` or another mount point is the same store.
Without --yes no artifact is deleted: it moves to <store>/set_aside, from where it can be moved back. Exit codes: 0, 2 the request is
wrong, or a run that is to be kept reaches no artifact of this store.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data_contracts.artifact import RECORD
from data_contracts.errors import ArtifactError, ConfigError, PipelineError, print_error
from data_contracts.files import bytes_below
from data_contracts.set_aside import SET_ASIDE, list_set_aside, set_aside
from data_contracts.store import Store
from data_contracts.words import format_bytes

YOUNG_SECONDS = 3600.0
"""A run that is under way has built things that no link shows yet."""
WAITING_SECONDS = 7 * 86400.0
"""Unfinished work of an interrupted run is kept for so long."""
TARGET = re.compile(r".*(?:^|/)artifacts/([^/]+)/([^/]+)(?:/|$)")
"""A link of a run names its artifact by the end of its text, wherever the store lies."""

BY_GC = "gc"
Name = tuple[str, str]
"""Kind and key of an artifact."""


class Removal(NamedTuple):
    path: Path
    size: int
    why: str


def gc(
    store: Store, keep_runs: int, dry_run: bool = False, delete: bool = False, young_seconds: float = YOUNG_SECONDS
) -> list[Removal]:
    """Set aside what the last `keep_runs` runs do not need and return it; `delete` also deletes what a gc has ever set aside, `dry_run` changes nothing.

    Raises: ConfigError for a negative number, or if nothing can be said to be unneeded because a run to be kept reaches no artifact.
    """
    if keep_runs < 0:
        raise ConfigError(f"--keep-runs is {keep_runs}: it must be 0 or more")
    runs = sorted(_runs(store), key=lambda run: -_last_shown(run))
    kept = _kept_by_runs(store, runs[:keep_runs], keep_runs)
    kept |= _reachable(store, {name for name in _artifacts(store) if _is_wanted(store, name, kept, young_seconds)})
    removals = []
    for name in _artifacts(store):
        path = store.directory(*name)
        if name not in kept:
            removals += _remove_artifact(store, name, dry_run, delete)
        elif (path / RECORD).is_file() and (path / "resume").is_dir():
            removals += _remove(path / "resume", "state to resume a training from that is finished", dry_run)
    for run in runs[keep_runs:]:
        for step in sorted(path for path in run.iterdir() if path.is_dir()):
            removals += _remove(step, f"links of the run {run.name}", dry_run)
    for path in _forgotten_passes(store, kept, young_seconds):
        removals += _remove(path, "log-probs of a model that no kept artifact has seen", dry_run)
    if delete and not dry_run:
        for path, reason in list_set_aside(store.root):
            if reason.get("by") == BY_GC:
                shutil.rmtree(path, ignore_errors=True)
    if not dry_run:
        store.sweep()
        _remove_idle_locks(store)
    return removals


def _kept_by_runs(store: Store, runs: list[Path], keep_runs: int) -> set[Name]:
    """What the links of these runs reach. Raises: ConfigError for a run that reaches nothing: then the links are at fault, not the artifacts."""
    existing, kept = set(_artifacts(store)), set()
    for run in runs:
        targets = {name for link in _links(run) if (name := _target(link)) is not None}
        if existing and not targets & existing:
            raise ConfigError(
                f"the run {run.name} is to be kept, and none of its links leads to an artifact of {store.root}: nothing is removed. "
                f"Look at {run}; if that run is not needed any more, remove its directory"
            )
        kept |= _reachable(store, targets)
    if keep_runs and existing and not runs:
        raise ConfigError(
            f"no run of {store.root} has links to artifacts, so --keep-runs {keep_runs} would keep none of {len(existing)}: nothing is removed. "
            "`--keep-runs 0` says that none is needed"
        )
    return kept


def _runs(store: Store) -> list[Path]:
    """Runs that still have links."""
    return [path for path in (store.root / "runs").glob("*") if path.is_dir() and _links(path)]


def _links(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.is_symlink()]


def _last_shown(run: Path) -> float:
    return max(link.lstat().st_mtime for link in _links(run))


def _target(link: Path) -> Name | None:
    """The artifact that a run's link names; None for a model outside of the store."""
    match = TARGET.match(os.path.normpath(os.readlink(link)))
    return (match[1], match[2]) if match else None


def _artifacts(store: Store) -> list[Name]:
    return store.artifact_names()


def _reachable(store: Store, starts: set[Name]) -> set[Name]:
    """Those of these artifacts that are there, their inputs, and so on."""
    existing, reached, todo = set(_artifacts(store)), set(), list(starts)
    while todo:
        name = todo.pop()
        if name in existing and name not in reached:
            reached.add(name)
            todo += _inputs(store, name)
    return reached


def _inputs(store: Store, name: Name) -> list[Name]:
    """What its record names, or for unfinished work its spec; nothing, if neither can be read."""
    path = store.directory(*name)
    try:
        record = store.load(*name)
        refs = [(ref.kind, ref.key) for ref in record.inputs.values()] if record else None
    except ArtifactError:
        refs = None
    if refs is None:
        try:
            refs = [
                (ref["kind"], ref["key"]) for ref in json.loads((path / "spec.json").read_text())["inputs"].values()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
    # A checkpoint from the middle of a training ("<key>/steps/000004") lies in the artifact of the training.
    return [(kind, key.partition("/")[0]) for kind, key in refs if key != "external"]


def _is_wanted(store: Store, name: Name, kept: set[Name], young_seconds: float) -> bool:
    path = store.directory(*name)
    with store.try_lock(*name) as holder:
        if holder is not None:
            return True
    age = time.time() - max((one.lstat().st_mtime for one in (path, *path.iterdir())), default=0.0)
    if age < young_seconds:
        return True
    if (path / RECORD).is_file():
        return False
    inputs = _inputs(store, name)
    return bool(inputs) and age < WAITING_SECONDS and set(inputs) <= kept


def _remove_artifact(store: Store, name: Name, dry_run: bool, delete: bool) -> list[Removal]:
    path = store.directory(*name)
    with store.try_lock(*name) as holder:
        if holder is not None:  # another process has just begun to build or read it
            return []
        removal = Removal(
            path, bytes_below(path), "of no kept run" if (path / RECORD).is_file() else "unfinished, of no kept run"
        )
        if delete and not dry_run:
            store.discard(*name)
        elif not dry_run:
            set_aside(store.root, path, removal.why, by=BY_GC)
        return [removal]


def _remove(path: Path, why: str, dry_run: bool) -> list[Removal]:
    removal = Removal(path, bytes_below(path), why)
    if not dry_run:
        shutil.rmtree(path, ignore_errors=True)
    return [removal]


def _forgotten_passes(store: Store, kept: set[Name], young_seconds: float) -> list[Path]:
    """Log-prob stores of models that are neither a kept checkpoint nor an input of a kept artifact."""
    known = set()
    for name in kept:
        with suppress(ArtifactError):
            if (record := store.load(*name)) is not None:
                known |= {record.content[:16]} | {ref.content[:16] for ref in record.inputs.values()}
    return sorted(
        path
        for path in (store.root / "logps").glob("*")
        if path.name.partition("-")[0] not in known and time.time() - path.stat().st_mtime > young_seconds
    )


def _remove_idle_locks(store: Store) -> None:
    """Lock files of artifacts that are no more. Whoever opened one meanwhile notices that it is gone (Store.lock)."""
    for kind, key in store.lock_names():
        if store.directory(kind, key).is_dir():
            continue
        with store.try_lock(kind, key) as holder:
            if holder is None:
                for pattern in ("", "@*", ".lease-*"):
                    for path in (store.root / "locks").glob(f"{kind}-{key}{pattern}"):
                        path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts.gc", description=__doc__.splitlines()[0].partition(": ")[2]
    )
    parser.add_argument("--keep-runs", type=int, required=True, metavar="N", help="the last N runs stay as they are")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="say what would be set aside, change nothing")
    choice.add_argument("--yes", action="store_true", help="delete it, and what earlier calls have set aside")
    parser.add_argument("--store", metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store")
    options = parser.parse_args(arguments)
    try:
        store = Store(options.store)
        earlier = list_set_aside(store.root)
        removals = gc(store, options.keep_runs, options.dry_run, options.yes)
    except PipelineError as error:
        return print_error(error)
    for removal in removals:
        print(f"{format_bytes(removal.size):>12}  {removal.path.relative_to(store.root)}  ({removal.why})")
    for path, reason in earlier:
        print(
            f"{format_bytes(reason['size']):>12}  {path.relative_to(store.root)}  (set aside by {reason['by']}: {reason['why']})"
        )
    total = format_bytes(sum(removal.size for removal in removals))
    deed = "would set aside" if options.dry_run else "deleted" if options.yes else "set aside"
    print(f"{deed} {total}: {len(removals)} thing(s) that the last {options.keep_runs} run(s) do not need")
    if removals and not options.dry_run and not options.yes:
        print(f"they lie in {store.root / SET_ASIDE}; the same command with --yes deletes them")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
