"""Stages - how workers share the shards of one artifact: a claim per shard, held by flock while it is made.

    <artifact>/.claims/<shard>     one JSON object per line: who tried, whether the shard was made, what went wrong;
                                   the lock is on this file

The kernel drops the claim of a worker that dies, on whatever node, and another worker takes the shard. A shard that was
tried twice and not made is poison: no worker tries it again, the others are finished, and `poison` names it. Needs
nothing but flock on the shared file system (NFSv4 has it; Lustre wants the mount option `flock`).
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
from typing import Any, NamedTuple, TextIO, TypedDict, cast

from data_contracts.errors import StageError, TransientError

CLAIMS = ".claims"
TRIES = 2
WORKER = "SELFPLAY_WORKER"
"""Environment variable: "2/8" is the third of eight workers on this artifact."""


class ClaimEvent(TypedDict, total=False):
    """One line of a claim file: the start of a try (with worker, host and rows), its end, or its error."""

    start: float
    worker: int
    host: str
    items: str
    done: float
    error: str


class Poison(NamedTuple):
    """A shard that failed `TRIES` times."""

    name: str
    items: str
    """The ids of its first and last row."""
    tries: list[str]
    """How each try ended, and on which host."""

    def __str__(self) -> str:
        return f"{self.name} ({self.items}): " + "; then ".join(self.tries)


class Claims:
    """The claims of one worker on the shards of one artifact."""

    def __init__(self, directory: Path, worker: str, supervised: Path | None = None):
        """`supervised`: the lock file of the process that started the workers. While it is free, this worker claims no
        further shard.
        """
        self.directory, self.supervised = directory / CLAIMS, supervised
        number, _, count = worker.partition("/")
        self.number, self.count = int(number), int(count or 1)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.claimed: dict[int, TextIO] = {}
        """The open, locked claim files of the shards that are being made."""

    def share(
        self, name: str, count: int, is_done: Callable[[int], bool], label: Callable[[int], str]
    ) -> Iterator[int]:
        """Yield the shards that this worker is to make, each claimed while the caller makes it.

        When the iteration ends, every shard is made or poison.
        """
        for index in self.share_ahead(name, count, is_done, label):
            if index is not None:
                yield index  # if the caller fails, the claim stays until `failed` or the end of the process
                self.finish(index)

    def share_ahead(
        self, name: str, count: int, is_done: Callable[[int], bool], label: Callable[[int], str]
    ) -> Iterator[int | None]:
        """Yield the shards that this worker is to make, each claimed until `finish`: the caller may read ahead.

        None asks the caller to finish all shards before it reads on: a worker that waits must not hold what others
        wait for, nor more than its part of the whole while they have nothing. First come the shards that no worker has claimed; then, waiting while another worker makes one, those
        that a dead worker left, one at a time: whichever of them is the bad one fails alone. `is_done` is called under
        the claim.
        """
        fair_share = -(-count // self.count)
        first = self.number * count // self.count  # far from where the other workers begin
        order = [*range(first, count), *range(first)]
        for patient in (False, True):
            postponed = []
            for index in order:
                path = self.directory / f"{name}-{index:05d}"
                file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the lock outlives a failure
                tries, is_made = _read(file) if self._lock(file, patient) else (None, False)
                # A shard that failed before comes last: it may kill this worker too.
                if tries is None or (tries and not patient):
                    postponed.append(index)
                elif not is_made and tries < TRIES and not is_done(index):
                    self.claimed[index] = file
                    _note(file, start=time.time(), worker=self.number, host=os.uname().nodename, items=label(index))
                    yield index
                    if patient or len(self.claimed) >= fair_share:
                        yield None
                    continue
                file.close()
            yield None
            order = postponed

    def finish(self, index: int) -> None:
        """Write down that a claimed shard is made, and give its claim up."""
        file = self.claimed.pop(index)
        _note(file, done=time.time())
        file.close()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let one worker at a time enter the block called `name`."""
        with open(self.directory / f".{name}", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _lock(self, file: TextIO, patient: bool) -> bool:
        """Lock a claim file; returns False if another worker holds it and `patient` is False."""
        pause = 0.05
        while True:
            self._stop_if_unsupervised()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not patient:
                    return False
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _stop_if_unsupervised(self) -> None:
        """Raises: TransientError if the process that started the workers is gone: nothing would be signed."""
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

    def failed(self, error: BaseException) -> None:
        """Write down why the claimed shards were not made."""
        for file in self.claimed.values():
            _note(file, error=f"{type(error).__name__}: {error}"[:2000])


def _note(file: TextIO, **event: Any) -> None:
    """Append a `ClaimEvent` to a claim file."""
    file.write(json.dumps(event) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _read(file: TextIO) -> tuple[int, bool]:
    """(tries so far, whether one succeeded) of a claim file."""
    file.seek(0)
    lines = [_parse(line) for line in file]
    return sum("start" in line for line in lines), any("done" in line for line in lines)


def _parse(line: str) -> ClaimEvent:
    try:
        event = json.loads(line)
    except ValueError:  # cut by a kill
        return {}
    if isinstance(event, dict):
        return cast(ClaimEvent, event)
    return {}


def forget(directory: Path) -> None:
    """Remove all claims of an artifact: earlier failures no longer count."""
    shutil.rmtree(directory / CLAIMS, ignore_errors=True)


def history(directory: Path) -> Iterator[tuple[str, list[ClaimEvent]]]:
    """Yield (shard name, its claim events) for every claim of an artifact."""
    for path in sorted((directory / CLAIMS).glob("[!.]*")):
        yield path.name, [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]


def starts(directory: Path) -> int:
    """The number of tries so far, over all shards."""
    return sum("start" in line for _, lines in history(directory) for line in lines)


def poison(directory: Path) -> list[Poison]:
    """The shards that failed `TRIES` times."""
    given_up = []
    for name, lines in history(directory):
        tries = [line for line in lines if "start" in line]
        if len(tries) < TRIES or any("done" in line for line in lines):
            continue
        outcomes: list[str] = []
        for line in lines:
            if "start" in line:
                outcomes.append(f"killed on {line.get('host', '?')}")
            elif "error" in line and outcomes:
                outcomes[-1] = f"{line['error']} on {outcomes[-1].removeprefix('killed on ')}"
        given_up.append(Poison(name, tries[0].get("items", "?"), outcomes))
    return given_up


def raise_poison(stage: str, given_up: Sequence[Poison]) -> None:
    """Raises: StageError naming every shard that was given up."""
    raise StageError(
        f"{stage}: {len(given_up)} of its shards failed {TRIES} times and were set aside; all others are made. "
        + " | ".join(map(str, given_up[:5]))
        + ". Mend the cause (or take these rows out of the prompts) and run again: only these shards are made"
    )


def label_of(items: Iterable[Any]) -> str:
    """`p001 ... p064`: the ids of the first and last row of a shard."""
    ids = []
    for item in items:
        if isinstance(item, dict):
            ids.append(item.get("pair_id", item.get("prompt_id")))
        else:
            ids.append(getattr(item, "prompt_id", "?"))
    if not ids:
        return "no rows"
    if len(ids) == 1:
        return str(ids[0])
    return f"{ids[0]} ... {ids[-1]}"
