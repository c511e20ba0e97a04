"""Contracts - directories moved out of the way: nobody looks for them any more, and a person can move them back.

<root>/set_aside/<date>-<kind>-<key>/     the files as they were, and the reason in set_aside.json
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypedDict

from data_contracts.files import bytes_below, write_atomic

SET_ASIDE, REASON = "set_aside", "set_aside.json"


class Reason(TypedDict):
    """The content of `set_aside.json`."""

    why: str
    by: str
    was: str
    """Where the directory was, relative to the root of the store."""
    size: int
    since: str


class SetAside(NamedTuple):
    path: Path
    reason: Reason


def set_aside(root: Path, path: Path, why: str, by: str) -> Path:
    """Move a directory of the store `root` to `set_aside/`, with the reason beside its files; return where it lies now.

    The caller holds the lock of the artifact.
    """
    target = _free_directory(root, path)
    target.parent.mkdir(exist_ok=True)
    _write_reason(path, why, by, was=path.relative_to(root), size=bytes_below(path))
    shutil.move(path, target)  # a rename, unless artifacts/ is a link to another disk
    return target


def set_files_aside(root: Path, directory: Path, paths: Sequence[Path], why: str, by: str) -> Path:
    """Move single files of an artifact's `directory` to a directory in `set_aside/`; return that directory."""
    target = _free_directory(root, directory)
    size = sum(path.stat().st_size for path in paths)
    for path in paths:
        moved = target / path.relative_to(directory)
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, moved)
    _write_reason(target, why, by, was=directory.relative_to(root), size=size)
    return target


def _free_directory(root: Path, path: Path) -> Path:
    parts = [part for part in path.relative_to(root).parts if part != "artifacts"]
    name = "-".join([time.strftime("%Y-%m-%d"), *parts])
    target, number = root / SET_ASIDE / name, 1
    while target.exists():
        number += 1
        target = root / SET_ASIDE / f"{name}.{number}"
    return target


def _write_reason(directory: Path, why: str, by: str, was: Path, size: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    reason = Reason(why=why, by=by, was=was.as_posix(), size=size, since=now)
    write_atomic(directory / REASON, json.dumps(reason, indent=1))


def list_set_aside(root: Path) -> list[SetAside]:
    """Return each directory that was set aside in the store `root`, with the reason."""
    entries: list[SetAside] = []
    for path in sorted((root / SET_ASIDE).glob("*")):
        reason = Reason(why="no readable reason", by="?", was="?", size=0, since="?")
        with suppress(OSError, ValueError, TypeError):
            reason.update(json.loads((path / REASON).read_text(encoding="utf-8")))
        entries.append(SetAside(path, reason))
    return entries
