"""Stages - the checkpoint that an interrupted training resumes from: whole, or not used.

    resume/step40/...       the engine's files, of all ranks
    resume/latest           {"tag": "step40", "files": {name: size}}: written last and atomically, by us

(DeepSpeed rewrites its own `latest` in place: a kill in between leaves it empty, and every later try would fail on it.)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from data_contracts.files import write_atomic

LATEST = "latest"


def seal(directory: Path, tag: str) -> None:
    """Make `tag` the checkpoint to resume from, once every rank has written its part; then remove the earlier ones."""
    paths = sorted(path for path in (directory / tag).rglob("*") if path.is_file())
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}
    write_atomic(directory / LATEST, json.dumps({"tag": tag, "files": sizes}))
    for path in directory.glob("step*"):
        if path.name != tag:
            shutil.rmtree(path, ignore_errors=True)


def sealed(directory: Path) -> str | None:
    """The tag of the checkpoint if its files have the sizes they were sealed with; None: train from the start."""
    try:
        latest = json.loads((directory / LATEST).read_bytes())
        if all((directory / name).stat().st_size == size for name, size in latest["files"].items()):
            return str(latest["tag"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def forget(directory: Path) -> None:
    """Invalidate the marker; the files are deleted with the next checkpoint or the artifact."""
    (directory / LATEST).unlink(missing_ok=True)
