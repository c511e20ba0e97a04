"""Tasks - the interface of an execution engine: start a piece of work, see whether and how it ended, end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Work(NamedTuple):
    """One process tree: `python -m stages ARGUMENTS`, on each of `nodes` machines."""

    name: str
    """Shown to people, e.g. sample-3f9c1a7b-w2."""
    arguments: tuple[str, ...]
    """Of `python -m stages`."""
    log_file: Path
    """Receives the output; the directory is shared by all nodes."""
    env: dict[str, str]
    """Environment variables beside the inherited ones."""
    python: str | None = None
    """Interpreter; None: this process's own."""
    gpus: int = 0
    """On each node."""
    nodes: int = 1
    timeout: float | None = None
    """Seconds after which the work is ended; None: never."""


class Handle(Protocol):
    """A piece of work that was started."""

    def has_ended(self) -> bool:
        """Whether the work is over. Returns at once. Raises: TransientError if it has waited too long for its start."""
        ...

    def error(self) -> Exception | None:
        """Why the work failed, or None if it succeeded. Call it only after `has_ended` returned True."""
        ...

    def cancel(self) -> None:
        """End the work unless it has ended, and free what it holds. Never raises."""
        ...


class Executor(Protocol):
    """An engine: processes of this machine, a Prefect work pool, Ray or Slurm."""

    def start(self, work: Work) -> Handle:
        """Start a piece of work. Raises: ConfigError if the engine can never run it."""
        ...


def perform(
    executor: Executor,
    works: Sequence[Work],
    tick: Callable[[], None],
    pause: float = 0.2,
    again: Callable[[Work, Exception], bool] = lambda work, error: False,
) -> list[Exception | None]:
    """Run all works side by side; returns one error or None per work.

    tick: called once per round, e.g. to report progress. pause: seconds between two rounds. again: whether a failed
    work is started once more. An exception raised here (a cancel, Ctrl-C) ends all works.
    """
    errors: list[Exception | None] = [None] * len(works)
    running: dict[int, Handle] = {}
    try:
        for number, work in enumerate(works):
            running[number] = executor.start(work)
        while running:
            for number, handle in list(running.items()):  # has_ended also forwards a local work's output
                if not handle.has_ended():
                    continue
                errors[number] = error = handle.error()
                handle.cancel()
                del running[number]
                if error is not None and again(works[number], error):
                    running[number] = executor.start(works[number])
            tick()
            time.sleep(pause)
        return errors
    finally:
        for handle in running.values():
            handle.cancel()
