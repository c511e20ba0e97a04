"""Stages - how several workers share the shards of one artifact: a claim per shard, held by flock while it is made.

    <artifact>/.claims/<name>      who tried, whether it was done, what went wrong: one JSON object per line; the lock is on the file

The kernel drops the claim of a worker that dies, on whatever node, and another one takes the shard. A shard that was tried twice and not
made is poison: nobody tries it again, the others are finished, and `poison` names it. Needs nothing but flock on the shared file system
(NFSv4 has it; Lustre wants the mount option `flock`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from data_contracts.errors import StageError, TransientError

CLAIMS = ".claims"
TRIES = 2
WORKER = "SELFPLAY_WORKER"
"""Environment: "2/8", the third of eight workers on this artifact."""


class Poison(NamedTuple):
    """A shard that nobody could make."""

    name: str
    items: str
    """The first and last of its rows, by id."""
    tries: list[str]
    """How each try ended, and where."""

    def __str__(self) -> str:
        return f"{self.name} ({self.items}): " + "; then ".join(self.tries)


class Claims:
    """This worker's hand in the work on one artifact."""

    def __init__(self, directory: Path, worker: str, supervised: Path | None = None):
        """`supervised`: the lock file of whoever started the workers; when nobody holds it any more, a worker takes no further shard."""
        self.directory, self.supervised = directory / CLAIMS, supervised
        number, _, count = worker.partition("/")
        self.number, self.count = int(number), int(count or 1)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.held: TextIO | None = None

    def share(
        self, name: str, count: int, is_done: Callable[[int], bool], label: Callable[[int], str]
    ) -> Iterator[int]:
        """Yield the shards that this worker is to make, each claimed while the caller makes it.

        First those that nobody has; then, waiting where one is being made, whatever a dead worker left. After the last one every
        shard is done, or poison. `is_done` is asked under the claim.
        """
        begin = self.number * count // self.count  # far from where the others begin
        order = [*range(begin, count), *range(begin)]
        for patient in (False, True):
            left = []
            for index in order:
                file = open(self.directory / f"{name}-{index:05d}", "a+", encoding="utf-8")  # noqa: SIM115 - outlives a failure
                tries, done = _read(file) if self._lock(file, patient) else (None, False)
                if tries is None or (
                    tries and not patient
                ):  # what failed once comes last: it may take this worker down, too
                    left.append(index)
                elif not done and tries < TRIES and not is_done(index):
                    self.held = file
                    self._note(start=time.time(), worker=self.number, host=os.uname().nodename, items=label(index))
                    yield index  # should the caller fail, the claim stays ours until `failed` or the end of the process
                    self._note(done=time.time())
                    self.held = None
                file.close()
            order = left

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one worker at a time do this."""
        with open(self.directory / f".{name}", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock(self, file: TextIO, patient: bool) -> bool:
        pause = 0.05
        while True:
            self._stop_if_alone()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not patient:
                    return False
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _stop_if_alone(self) -> None:
        """Raises: TransientError if the process that started the workers is gone: nobody would sign what they make."""
        if self.supervised is None:
            return
        with open(self.supervised, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        raise TransientError(
            f"the run that started this worker is gone ({self.supervised} is free): no further shard is taken"
        )

    def _note(self, **line: Any) -> None:
        assert self.held is not None
        self.held.write(json.dumps(line) + "\n")
        self.held.flush()
        os.fsync(self.held.fileno())

    def failed(self, error: BaseException) -> None:
        """Write down why the shard in hand was not made."""
        if self.held is not None:
            self._note(error=f"{type(error).__name__}: {error}"[:2000])


def _read(file: TextIO) -> tuple[int, bool]:
    file.seek(0)
    lines = [_parse(line) for line in file]
    return sum("start" in line for line in lines), any("done" in line for line in lines)


def _parse(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:  # cut by a kill
        return {}


def forget(directory: Path) -> None:
    """Begin anew: earlier failures count no more."""
    shutil.rmtree(directory / CLAIMS, ignore_errors=True)


def history(directory: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every claim with its lines."""
    for path in sorted((directory / CLAIMS).glob("[!.]*")):
        yield path.name, [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]


def starts(directory: Path) -> int:
    """Tries so far, of all shards."""
    return sum("start" in line for _, lines in history(directory) for line in lines)


def poison(directory: Path) -> list[Poison]:
    """The shards that were given up."""
    found = []
    for name, lines in history(directory):
        begun = [line for line in lines if "start" in line]
        if len(begun) < TRIES or any("done" in line for line in lines):
            continue
        errors: list[str] = []
        for line in lines:
            if "start" in line:
                errors.append(f"killed on {line['host']}")
            elif "error" in line:
                errors[-1] = f"{line['error']} on {errors[-1].removeprefix('killed on ')}"
        found.append(Poison(name, begun[0]["items"], errors))
    return found


def raise_poison(stage: str, found: Sequence[Poison]) -> None:
    """Raises: StageError naming every shard that was given up."""
    raise StageError(
        f"{stage}: {len(found)} shard(s) failed {TRIES} times and were set aside; all others are made and kept. "
        + " | ".join(map(str, found[:5]))
        + ". Mend the cause (or take these rows out of the prompts) and run again: only these shards are made"
    )


def label_of(items: Iterable[Any]) -> str:
    """`p001 ... p064`: the rows of a shard by their ids."""
    ids = [
        item.get("pair_id", item.get("prompt_id")) if isinstance(item, dict) else getattr(item, "prompt_id", "?")
        for item in items
    ]
    return "no rows" if not ids else f"{ids[0]}" if len(ids) == 1 else f"{ids[0]} ... {ids[-1]}"
