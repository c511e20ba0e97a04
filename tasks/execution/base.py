"""Tasks - what an execution engine is: it starts a piece of work somewhere, says whether it has ended and how, and can end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class Work(NamedTuple):
    """One process tree: `python -m stages ARGUMENTS`, on each of `nodes` machines."""

    name: str
    """For people: sample-3f9c1a7b-w2."""
    arguments: tuple[str, ...]
    log_file: Path
    env: dict[str, str]
    python: str | None = None
    gpus: int = 0
    """On each node."""
    nodes: int = 1
    timeout: float | None = None


class Handle(Protocol):
    def has_ended(self) -> bool: ...

    def error(self) -> Exception | None:
        """Why it failed; None if it did not. Asked after it has ended."""

    def cancel(self) -> None:
        """End it, if it has not ended. Never raises."""


class Executor(Protocol):
    def start(self, work: Work) -> Handle: ...


def perform(
    executor: Executor,
    works: Sequence[Work],
    tick: Callable[[], None],
    pause: float = 0.2,
    again: Callable[[Work, Exception], bool] = lambda work, error: False,
) -> list[Exception | None]:
    """Do all of it at once; one error or None per piece. What fails is started again if `again` says so. Whatever is raised here (a cancel)
    ends them all."""
    errors: list[Exception | None] = [None] * len(works)
    running: dict[int, Handle] = {}
    try:
        for number, work in enumerate(works):
            running[number] = executor.start(work)
        while running:
            for number, handle in list(running.items()):  # all are looked at each time: what they said is handed on
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
