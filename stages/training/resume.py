"""Stages - the checkpoint that an interrupted training goes on from: found whole, or not used.

    resume/step40/...       what the engine wrote, all ranks
    resume/latest           {"tag": "step40", "files": {name: size}}: written last and atomically, by us

(DeepSpeed's own `latest` is rewritten in place: a kill in between leaves it empty, and every later try would fail on it.)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from data_contracts.files import write_atomic

LATEST = "latest"


def seal(directory: Path, tag: str) -> None:
    """Make `tag` the checkpoint to go on from, once every rank has written its part; then remove the ones before."""
    files = sorted(path for path in (directory / tag).rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    write_atomic(directory / LATEST, json.dumps({"tag": tag, "files": sizes}))
    for path in directory.glob("step*"):
        if path.name != tag:
            shutil.rmtree(path, ignore_errors=True)


def sealed(directory: Path) -> str | None:
    """The tag of the checkpoint, if it is as long as when it was sealed. None: train from the start."""
    try:
        latest = json.loads((directory / LATEST).read_bytes())
        if all((directory / name).stat().st_size == size for name, size in latest["files"].items()):
            return str(latest["tag"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def forget(directory: Path) -> None:
    """Nobody goes on from it again; its files go with the next checkpoint's, or the artifact's."""
    (directory / LATEST).unlink(missing_ok=True)
