"""Contracts - where the pipeline itself lies: the checkout, or the package that pip installed; and the files it brings.

Run configs, prompts and evaluation tasks come along in deploy/ and are named by that path from any directory.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Holds the rooms (data_contracts, stages, tasks, flows) and deploy/: the checkout, or selfplay/rooms in site-packages."""
BROUGHT = "deploy/"
"""How the paths of files begin that come with the pipeline."""


def provided(path: str) -> str:
    """Return `path`, or where this installation has it: if it begins with deploy/ and the working directory lacks it.

    >>> provided("my/prompts.jsonl"), provided("deploy/no-such-file")
    ('my/prompts.jsonl', 'deploy/no-such-file')
    """
    installed = os.path.join(ROOT, path)
    if path.startswith(BROUGHT) and not os.path.exists(path) and os.path.exists(installed):
        return installed
    return path


def provided_beside(directory: Path, name: str) -> Path:
    """Return the file that another one in `directory` names: relative to it, else as `provided` finds it."""
    beside = directory / name
    if name.startswith(BROUGHT) and not os.path.exists(beside) and os.path.exists(provided(name)):
        return Path(provided(name))
    return beside


def import_paths() -> dict[str, str]:
    """Return the variables by which a child process imports our rooms, whatever interpreter runs it.

    The installation comes first, and the working directory is not searched: a user's tasks.py or flows/ there would
    hide a room of the same name.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
