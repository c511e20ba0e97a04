"""Stages - which prompts a policy cannot read: too long, refused by its template, or spelling control tokens.

Only prompts that might be too long are tokenised, and large files are shared by processes.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pyarrow as pa

from data_contracts.errors import ConfigError
from data_contracts.prompts import Message, PromptRow

Verdicts = dict[str, dict[int, Any]]
"""overlong: tokens; truncated: the messages that are left; dropped and unusable: why; each by number of the row."""
Encode = Callable[[list[Message]], list[int]]
MOST_WORKERS = 8
ROWS_PER_WORKER = 2000
"""Fewer are counted sooner than another process starts."""


def no_verdicts() -> Verdicts:
    """As of prompts that can all be read."""
    return {"overlong": {}, "truncated": {}, "dropped": {}, "unusable": {}}


class PromptChecker:
    """Checks prompts against one model and its settings."""

    def __init__(
        self,
        encode: Encode,
        limit: int,
        truncate: bool = False,
        reason_to_drop: Callable[[PromptRow], str | None] | None = None,
    ):
        """encode: the ids of a prompt; limit: how many there may be; truncate: whether to shorten what is longer.
        Both functions raise ConfigError for a row that is refused."""
        self.encode, self.limit, self.truncate, self.reason_to_drop = encode, limit, truncate, reason_to_drop
        self.overheads: dict[tuple[str, ...], int] = {}

    def check(self, rows: Iterable[tuple[int, PromptRow]]) -> Verdicts:
        """What is wrong with numbered rows."""
        verdicts = no_verdicts()
        for number, row in rows:
            try:
                if self.reason_to_drop is not None and (reason := self.reason_to_drop(row)):
                    verdicts["dropped"][number] = reason
                    continue
                self._count(number, row["messages"], verdicts)
            except ConfigError as error:
                verdicts["unusable"][number] = str(error)
        return verdicts

    def _count(self, number: int, messages: list[Message], verdicts: Verdicts) -> None:
        if self.surely_fits(messages):
            return
        count = len(self.encode(messages))
        if count == 0:
            verdicts["unusable"][number] = "the prompt has no token"
        elif count > self.limit:
            verdicts["overlong"][number] = count
            if self.truncate and (shorter := self.shortened(messages)) is not None:
                verdicts["truncated"][number] = shorter

    def surely_fits(self, messages: list[Message]) -> bool:
        """Return whether the prompt fits without counting: an ASCII token has at least one character."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self.overheads:
            placeholders: list[Message] = [{"role": role, "content": "x"} for role in roles]
            self.overheads[roles] = len(self.encode(placeholders)) + len(roles)
        if not all(message["content"].isascii() for message in messages):
            return False
        return self.overheads[roles] + sum(len(message["content"]) for message in messages) < self.limit

    def shortened(self, messages: list[Message]) -> list[Message] | None:
        """The messages without their beginning: oldest turns first, then the first words of the last turn.

        System messages stay. None: they alone are too long.
        """
        system = [message for message in messages if message["role"] == "system"]
        turns = [message for message in messages if message["role"] != "system"]
        while len(turns) > 1 and self._is_long([*system, *turns]):
            turns = turns[1:]
            while len(turns) > 1 and turns[0]["role"] != "user":
                turns = turns[1:]
        if not self._is_long([*system, *turns]):
            return [*system, *turns]
        role, text = turns[-1]["role"], turns[-1]["content"]

        def is_long_from(start: int) -> bool:
            return self._is_long([*system, {"role": role, "content": text[start:]}])

        too_early, enough = 0, len(text) - 1  # where the text could begin
        if is_long_from(enough):
            return None
        while enough - too_early > 1:
            middle = (enough + too_early) // 2
            if is_long_from(middle):
                too_early = middle
            else:
                enough = middle
        if text[enough:].strip():
            return [*system, {"role": role, "content": text[enough:]}]
        return None

    def _is_long(self, messages: list[Message]) -> bool:
        return len(self.encode(messages)) > self.limit


def check_file(path: str, checker: PromptChecker) -> Verdicts:
    """What is wrong with the prompts of an Arrow file; the processors that this process may use share a long one."""
    batches = pa.ipc.open_stream(pa.memory_map(path)).read_all().to_batches()
    if checker.reason_to_drop is None:
        batches = [batch.select(["messages"]) for batch in batches]
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + batch.num_rows)
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)), starts[-1] // ROWS_PER_WORKER)

    def check_batch(number: int) -> Verdicts:
        return checker.check(enumerate(cast("list[PromptRow]", batches[number].to_pylist()), starts[number]))

    if workers < 2:
        parts = map(check_batch, range(len(batches)))
    else:
        parts = _in_processes(check_batch, len(batches), workers)
    verdicts = no_verdicts()
    for part in parts:
        for name, rows in part.items():
            verdicts[name] |= rows
    return verdicts


_check_batch: Callable[[int], Verdicts] | None = None
"""What a forked process calls: it has the tokenizer and the rows from its parent."""


def _in_processes(check_batch: Callable[[int], Verdicts], count: int, workers: int) -> Iterator[Verdicts]:
    global _check_batch
    _check_batch = check_batch
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer do not survive a fork
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_check_in_process, range(count))


def _check_in_process(number: int) -> Verdicts:
    assert _check_batch is not None
    return _check_batch(number)
