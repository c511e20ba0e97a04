"""Tasks - rows as they come -> a set of prompts in which every row is once and has an id of its own."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow, has_written_id
from tasks.data.prompt_set import BATCH, PromptSet, batch_of, canonical_row


class Collector:
    """Keeps rows as columns, each once; with a limit, those whose digests are smallest, which the seed decides."""

    def __init__(self, limit: int | None, seed: int):
        self.limit, self.salt = limit, seed.to_bytes(16, "little", signed=True)
        self.digests, self.places = array("Q"), array("q")
        self.batches: list[pa.RecordBatch] = []
        self.waiting: list[PromptRow] = []
        self.kept = array("q")
        """Numbers of the rows in batches and waiting, among all that were added."""
        self.threshold = 2**64 - 1
        """No row with a larger digest can be among the smallest."""

    def add(self, row: PromptRow, file: int, number: int) -> None:
        # 64 bits: that two of a million different rows share a digest has the probability 3e-8.
        content = canonical_row({**row, "source": ""}).encode()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=self.salt).digest(), "little")
        self.digests.append(digest)
        self.places.extend((file, number))
        if digest > self.threshold:
            return
        self.kept.append(len(self.digests) - 1)
        self.waiting.append(row)
        if len(self.waiting) == BATCH:
            self._flush()

    def finish(self, files: list[str], unit: str) -> tuple[PromptSet, list[tuple[str, str]]]:
        """The rows, and the places of the rows that repeat an earlier one, with its place."""
        self._flush()
        digests = np.asarray(self.digests, np.uint64)
        everything = PromptSet(self.batches, np.asarray(self.places, np.int64).reshape(-1, 2), files, unit)
        smallest, first = np.unique(digests, return_index=True)
        rows_held = np.asarray(self.kept, np.int64)
        is_chosen = np.isin(rows_held, first[: self.limit])
        chosen = np.flatnonzero(is_chosen)
        prompts = PromptSet(self.batches, everything.places[rows_held], files, unit).take(chosen)
        is_repetition = np.ones(len(digests), bool)
        is_repetition[first] = False
        numbers = np.flatnonzero(is_repetition)
        earlier = first[np.searchsorted(smallest, digests[numbers])]
        where = everything.where
        return prompts, [
            (where(int(number)), where(int(other))) for number, other in zip(numbers, earlier, strict=True)
        ]

    def _flush(self) -> None:
        if self.waiting:
            self.batches.append(batch_of(self.waiting))
            self.waiting = []
        if self.limit is not None and len(self.kept) > 2 * self.limit + 10 * BATCH:
            self._prune(self.limit)

    def _prune(self, limit: int) -> None:
        """Let go of the rows that cannot be among the smallest any more."""
        self.threshold = int(np.unique(np.asarray(self.digests, np.uint64))[limit - 1])
        rows_held = np.asarray(self.kept, np.int64)
        stays = np.flatnonzero(np.asarray(self.digests, np.uint64)[rows_held] <= self.threshold)
        self.batches = PromptSet(self.batches, np.zeros((len(rows_held), 2)), [], "").take(stays).batches
        self.kept = array("q", rows_held[stays].tobytes())


def with_unique_ids(prompts: PromptSet, of_one_source: bool = True) -> tuple[PromptSet, list[str]]:
    """Several rows of one prompt get ids of their own, id-2, id-3 ...; and a note if somebody had written these ids.

    Raises: ConfigError if one source gives an id to different prompts: which of them is meant?
    """
    if len(np.unique(np.fromiter(map(hash, _ids(prompts)), np.int64, len(prompts)))) == len(prompts):
        return prompts, []
    counts = Counter(_ids(prompts))
    if of_one_source:
        _refuse_ids_of_different_prompts(prompts, counts)
    taken, uses, written = set(counts), Counter[str](), 0

    def numbered(_: int, row: PromptRow) -> PromptRow:
        nonlocal written
        prompt_id = row["prompt_id"]
        if counts[prompt_id] == 1:
            return row
        uses[prompt_id] += 1
        if uses[prompt_id] == 1:
            return row
        written += has_written_id(row)
        while f"{prompt_id}-{uses[prompt_id]}" in taken:
            uses[prompt_id] += 1
        new_id = f"{prompt_id}-{uses[prompt_id]}"
        taken.add(new_id)
        return {**row, "prompt_id": new_id}

    prompts = prompts.map(numbered)
    note = f"{written} rows have the prompt_id of an earlier row: they are numbered (id-2, id-3 ...)"
    return prompts, [note] if written else []


def _ids(prompts: PromptSet) -> Iterator[str]:
    for batch in prompts.batches:
        yield from cast("list[str]", batch.column("prompt_id").to_pylist())


def _refuse_ids_of_different_prompts(prompts: PromptSet, counts: Counter[str]) -> None:
    """A conversation that goes on in another way is the same prompt: some sets name rows by their first question."""
    first: dict[str, tuple[int, str]] = {}
    conflicts: list[str] = []
    for index, row in enumerate(prompts):
        if counts[row["prompt_id"]] == 1:
            continue
        question = next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")
        earlier, earlier_question = first.setdefault(row["prompt_id"], (index, question))
        if question != earlier_question:
            place = f"{Path(prompts.file_of(index)).name} {prompts.where(index)}"
            conflicts.append(
                f"{place}: the prompt_id {row['prompt_id']!r} was already used in {prompts.where(earlier)}"
            )
    if conflicts:
        more = f" ({len(conflicts)} such rows)" if len(conflicts) > 1 else ""
        raise ConfigError(
            f"{conflicts[0]}, for another prompt{more}: ids must be unique. Mend them, or say with `columns` which "
            "columns are read"
        )
