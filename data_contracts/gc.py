"""python -m data_contracts.gc --keep-runs N [--dry-run | --yes] [--store DIR]: set aside what no recent run needs.

The last N runs keep all that they need; the rest is set aside.

Kept:
- every artifact that a link of a kept run leads to, and the inputs that its record names, all the way back;
- work that is being built (locked), with its inputs;
- unfinished work that only waits for its run to be started again, for a week;
- anything younger than an hour;
- reports (runs/<run>/report.md, .html) and whatever other rooms keep in directories of their own.

Artifacts are compared by kind and key, never by path: a store reached through links, `..` or another mount point is the
same store. Without --yes no artifact is deleted: it moves to <store>/set_aside, from where it can be moved back. With
--yes it is deleted, with all that earlier calls set aside.

Exit codes: 0; 2: the request is wrong, or a run that is to be kept reaches no artifact of this store.
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

from data_contracts.artifact import EXTERNAL, RECORD
from data_contracts.errors import ArtifactError, ConfigError, NewerRecordError, PipelineError, print_error
from data_contracts.files import bytes_below, replaced_by
from data_contracts.set_aside import REASON, SET_ASIDE, list_set_aside, set_aside
from data_contracts.store import Store
from data_contracts.streams import open_standard_streams
from data_contracts.words import format_bytes, plural

YOUNG_SECONDS = 3600.0
"""Younger artifacts are kept: a run in progress has built things that no link shows yet."""
WAITING_SECONDS = 7 * 86400.0
"""Unfinished work of an interrupted run is kept for this long."""
LINK_TARGET = re.compile(r".*(?:^|/)artifacts/([^/]+)/([^/]+)(?:/|$)")
"""A link of a run names its artifact by the end of its text, wherever the store lies."""
BY_GC = "gc"

Name = tuple[str, str]
"""Kind and key of an artifact."""


class Removal(NamedTuple):
    """A path that was, or would be, set aside or deleted."""

    path: Path
    size: int
    why: str


def gc(
    store: Store, keep_runs: int, dry_run: bool = False, delete: bool = False, young_seconds: float = YOUNG_SECONDS
) -> list[Removal]:
    """Set aside what the last `keep_runs` runs do not need and return it.

    dry_run: change nothing, only return what would be set aside
    delete: delete instead, with everything that earlier calls set aside
    Raises: ConfigError for a negative number of runs, and for a run that is to be kept but reaches no artifact: then
    nothing can be called unneeded.
    """
    kept_names = set(reasons_to_keep(store, keep_runs, young_seconds))
    return remove_others(store, keep_runs, kept_names, dry_run, delete, young_seconds)


def remove_others(
    store: Store,
    keep_runs: int,
    kept_names: set[Name],
    dry_run: bool = False,
    delete: bool = False,
    young_seconds: float = YOUNG_SECONDS,
) -> list[Removal]:
    """Set aside all but these artifacts, and the links of all but the last `keep_runs` runs; the rest as `gc`."""
    runs, removals = _runs_with_links(store), list[Removal]()
    for name in store.artifact_names():
        path = store.directory(*name)
        if name not in kept_names:
            removals += _remove_artifact(store, name, dry_run, delete)
        elif (path / RECORD).is_file() and (path / "resume").is_dir():
            removals.append(_remove(path / "resume", "state to resume a training from that is finished", dry_run))
    for run in runs[keep_runs:]:
        for step in sorted(path for path in run.iterdir() if path.is_dir()):
            removals.append(_remove(step, f"links of the run {run.name}", dry_run))
    for path in _unneeded_logps(store, kept_names, young_seconds):
        removals.append(_remove(path, "log-probs of a model that no kept artifact names", dry_run))
    if not dry_run:
        if delete:
            _delete_set_aside(store)
        store.sweep()
        _remove_idle_locks(store)
    return removals


# --- what is kept


def reasons_to_keep(store: Store, keep_runs: int, young_seconds: float = YOUNG_SECONDS) -> dict[Name, str]:
    """Return why each artifact stays that stays; of several reasons the first of: the newest run, its age or state, what
    needs it.

    Raises: ConfigError for a negative number of runs, and for a run that is to be kept but reaches no artifact;
    NewerRecordError for a record of a newer program, before anything moves.
    """
    if keep_runs < 0:
        raise ConfigError(f"--keep-runs is {keep_runs}: it must be 0 or more")
    for name in store.artifact_names():
        _inputs(store, name)
    reasons = _kept_by_runs(store, _runs_with_links(store)[:keep_runs], keep_runs)
    kept_names = set(reasons)
    in_use = {
        name: why
        for name in store.artifact_names()
        if (why := _why_in_use(store, name, kept_names, young_seconds)) and name not in kept_names
    }
    reasons |= in_use
    for name in _with_inputs(store, set(in_use)):
        reasons.setdefault(name, "an input of what is not finished, or young")
    return reasons


def kept_lines(store: Store, reasons: dict[Name, str]) -> list[str]:
    """Return a line per reason: how much stays for it, and how many artifacts."""
    groups: dict[str, list[int]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(bytes_below(store.directory(*name)))
    return [
        f"{format_bytes(sum(sizes)):>12}  {plural(len(sizes), 'artifact')}  ({why})" for why, sizes in groups.items()
    ]


def _kept_by_runs(store: Store, runs: list[Path], keep_runs: int) -> dict[Name, str]:
    """Return what the links of these runs reach, with all inputs, and for which run; the newest counts.

    Raises: ConfigError for a run that reaches nothing: then the links are at fault, not the artifacts.
    """
    existing, reasons = set(store.artifact_names()), dict[Name, str]()
    for run in runs:
        targets = {name for link in _links(run) if (name := _target(link)) is not None}
        if existing and not targets & existing:
            raise ConfigError(
                f"the run {run.name} is to be kept, and none of its links leads to an artifact of {store.root}: "
                f"nothing is removed. Look at {run}; if that run is not needed any more, remove its directory"
            )
        why = f"of the run {run.name}, or what it was made from"
        if reasons:
            why += "; no newer run has it"
        for name in _with_inputs(store, targets):
            reasons.setdefault(name, why)
    if keep_runs and existing and not runs:
        raise ConfigError(
            f"no run of {store.root} has links to artifacts, so --keep-runs {keep_runs} would keep none of "
            f"{len(existing)}: nothing is removed. `--keep-runs 0` says that none is needed"
        )
    return reasons


def _runs_with_links(store: Store) -> list[Path]:
    """The directories of runs that show artifacts, the newest first."""
    runs = [path for path in (store.root / "runs").glob("*") if path.is_dir() and _links(path)]
    return sorted(runs, key=_newest_link_time, reverse=True)


def _links(run: Path) -> list[Path]:
    return [path for path in run.rglob("*") if path.is_symlink()]


def _newest_link_time(run: Path) -> float:
    return max(link.lstat().st_mtime for link in _links(run))


def _target(link: Path) -> Name | None:
    """Return the artifact that a run's link names; None for a model outside of the store."""
    match = LINK_TARGET.match(os.path.normpath(os.readlink(link)))
    if match:
        return (match[1], match[2])
    return None


def _with_inputs(store: Store, names: set[Name]) -> set[Name]:
    """Return those of these artifacts that exist, their inputs, the inputs of those, and so on."""
    existing, reached, to_visit = set(store.artifact_names()), set[Name](), list(names)
    while to_visit:
        name = to_visit.pop()
        if name in existing and name not in reached:
            reached.add(name)
            to_visit += _inputs(store, name)
    return reached


def _inputs(store: Store, name: Name) -> list[Name]:
    """Return the inputs that an artifact's record names, or its spec if it is unfinished; [] if neither can be read."""
    try:
        record = store.load(*name)
    except NewerRecordError:
        raise
    except ArtifactError:
        record = None
    if record is not None:
        names = [(ref.kind, ref.key) for ref in record.inputs.values()]
    else:
        try:
            spec = json.loads((store.directory(*name) / "spec.json").read_text())
            names = [(ref["kind"], ref["key"]) for ref in spec["inputs"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
    # A checkpoint from the middle of a training ("<key>/steps/000004") lies in the artifact of the training.
    return [(kind, key.partition("/")[0]) for kind, key in names if key != EXTERNAL]


def _why_in_use(store: Store, name: Name, kept_names: set[Name], young_seconds: float) -> str:
    """Return why an artifact stays whose run is not kept: it is being built, young, or unfinished work whose inputs are
    kept. "" if it is none of these."""
    with store.try_lock(*name) as owner:
        if owner is not None:
            return "being built"
    directory = store.directory(*name)
    age = _age(directory)
    if age < young_seconds:
        return f"younger than {young_seconds / 60:.0f} minutes"
    if (directory / RECORD).is_file():
        return ""
    inputs = _inputs(store, name)
    if inputs and age < WAITING_SECONDS and set(inputs) <= kept_names:
        return f"unfinished work of a kept run, younger than {WAITING_SECONDS / 86400:.0f} days"
    return ""


def _age(directory: Path) -> float:
    """Return the seconds since a file of an artifact was written. What a killed call of `gc` did there does not count:
    files that it deleted, and the reason that it wrote to set the others aside.
    """
    paths = list(directory.iterdir())
    written = [path for path in paths if REASON not in (path.name, replaced_by(path))] if paths else [directory]
    return time.time() - max((path.lstat().st_mtime for path in written), default=0.0)


def _unneeded_logps(store: Store, kept_names: set[Name], young_seconds: float) -> list[Path]:
    """Return the log-prob directories of models that are neither a kept checkpoint nor an input of a kept artifact."""
    models: set[str] = set()
    for name in kept_names:
        with suppress(ArtifactError):
            record = store.load(*name)
            if record is not None:
                models |= {record.content[:16]} | {ref.content[:16] for ref in record.inputs.values()}
    return sorted(
        path
        for path in (store.root / "logps").glob("*")
        if path.name.partition("-")[0] not in models and time.time() - path.stat().st_mtime > young_seconds
    )


# --- what is removed


def _remove_artifact(store: Store, name: Name, dry_run: bool, delete: bool) -> list[Removal]:
    path = store.directory(*name)
    with store.try_lock(*name) as owner:
        if owner is not None:  # another process has just begun to build or read it
            return []
        why = "of no kept run" if (path / RECORD).is_file() else "unfinished, of no kept run"
        removal = Removal(path, bytes_below(path), why)
        if delete and not dry_run:
            store.discard(*name)
        elif not dry_run:
            set_aside(store.root, path, why, by=BY_GC)
        return [removal]


def _remove(path: Path, why: str, dry_run: bool) -> Removal:
    removal = Removal(path, bytes_below(path), why)
    if not dry_run:
        shutil.rmtree(path, ignore_errors=True)
    return removal


def _delete_set_aside(store: Store) -> None:
    """Delete what earlier calls set aside; what a person or a build set aside is for people to delete."""
    for path, reason in list_set_aside(store.root):
        if reason["by"] == BY_GC:
            shutil.rmtree(path, ignore_errors=True)


def _remove_idle_locks(store: Store) -> None:
    """Delete the lock files of artifacts that no longer exist. A process that has opened one notices (locks.hold)."""
    for kind, key in store.lock_names():
        if store.directory(kind, key).is_dir():
            continue
        with store.try_lock(kind, key) as owner:
            if owner is None:
                for suffix in ("", "@*", ".lease-*"):
                    for path in (store.root / "locks").glob(f"{kind}-{key}{suffix}"):
                        path.unlink(missing_ok=True)


# --- the command


def main(arguments: list[str]) -> int:
    """Run the command of the module's docstring and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_contracts.gc",
        description="Set aside what none of the last N runs needs; delete it with --yes.",
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
        reasons = reasons_to_keep(store, options.keep_runs)
        removals = remove_others(store, options.keep_runs, set(reasons), options.dry_run, options.yes)
    except PipelineError as error:
        return print_error(error)
    if reasons:
        print("\n".join(["stays:", *kept_lines(store, reasons), f"{'':12}  reports of all runs"]))
    if removals:
        print("does not stay:")
    for removal in removals:
        print(f"{format_bytes(removal.size):>12}  {removal.path.relative_to(store.root)}  ({removal.why})")
    for path, reason in earlier:
        why = f"set aside by {reason['by']}: {reason['why']}"
        print(f"{format_bytes(reason['size']):>12}  {path.relative_to(store.root)}  ({why})")
    deed = "set aside"
    if options.dry_run:
        deed = "would set aside"
    elif options.yes:
        deed = "deleted"
    size, paths = format_bytes(sum(removal.size for removal in removals)), plural(len(removals), "path")
    print(f"{deed} {size} in {paths} that --keep-runs {options.keep_runs} does not keep")
    if removals and deed == "set aside":
        print(f"they are in {store.root / SET_ASIDE}; the same command with --yes deletes them")
    return 0


if __name__ == "__main__":
    open_standard_streams()
    sys.exit(main(sys.argv[1:]))
