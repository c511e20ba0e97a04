"""Contracts - directories moved out of the way: nobody looks for them any more, and a person can move them back.

<root>/set_aside/<date>-<kind>-<key>/     the files as they were, and the reason in set_aside.json
"""

from __future__ import annotations

import json
import shutil
import time
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
    parts = path.relative_to(root).parts
    name = "-".join([time.strftime("%Y-%m-%d"), *(part for part in parts if part != "artifacts")])
    target, number = root / SET_ASIDE / name, 1
    while target.exists():
        number += 1
        target = root / SET_ASIDE / f"{name}.{number}"
    target.parent.mkdir(exist_ok=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    reason = Reason(why=why, by=by, was="/".join(parts), size=bytes_below(path), since=now)
    write_atomic(path / REASON, json.dumps(reason, indent=1))
    shutil.move(path, target)  # a rename, unless artifacts/ is a link to another disk
    return target


def list_set_aside(root: Path) -> list[SetAside]:
    """Return each directory that was set aside in the store `root`, with the reason."""
    entries: list[SetAside] = []
    for path in sorted((root / SET_ASIDE).glob("*")):
        reason = Reason(why="no readable reason", by="?", was="?", size=0, since="?")
        with suppress(OSError, ValueError, TypeError):
            reason.update(json.loads((path / REASON).read_text(encoding="utf-8")))
        entries.append(SetAside(path, reason))
    return entries
