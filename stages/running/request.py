"""Stages - what a fork server is asked for (stages/forkserver.py); to be imported by whoever asks."""

from __future__ import annotations

from typing import NamedTuple

TREE = "SELFPLAY_TREE"
"""Environment variable: marks the processes of one stage (tasks/launch.py)."""


class Request(NamedTuple):
    """A stage to start."""

    module: str
    """What `python -m MODULE ARGUMENTS` would run: stages, or another whose `main` takes the arguments and which has a
    `preload` without any."""
    arguments: list[str]
    environment: dict[str, str]
    """The whole environment of the stage."""
    directory: str
    """Its working directory."""
    grace: float
    """Seconds between SIGTERM and SIGKILL when its tree is ended."""
    launched: float
    """When it was asked for, in seconds since the epoch."""
