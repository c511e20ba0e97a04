"""Tasks - source -> prompts: every row that can be used, and what there is to say of the others.

Rows pass by one at a time and are kept as columns. A source with rows that cannot be used is read to its end, so that
all is said at once.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow, UnusableRow, has_written_id
from tasks.data.drops import REPETITION, Drops
from tasks.data.files import RawFile, open_source
from tasks.data.prompt_set import BATCH, PromptSet, batch_of, canonical_row, place_of
from tasks.data.shapes import Shape, columns_read, read_row, shape_of
from tasks.data.source import Source

WRITTEN_BY_A_POLICY = re.compile(r"generate_\d+|(all_)?generated_responses|completions")


class Reading(NamedTuple):
    """What a source holds."""

    prompts: PromptSet
    rows: int
    """Rows of the source, unusable ones included."""
    drops: Drops
    notes: list[str]
    """What a reader should know: splits and columns that are not read, ids that were given twice."""
    shape: str
    used: list[str]
    """Columns that were read."""
    ignored: list[str]


def read_source(source: Source, seed: int = 0) -> Reading:
    """Every usable row of a source that is no mix, in its order; with a `limit`, so many of them, drawn by `seed`.

    Raises: ConfigError for a source that cannot be read, has no prompts or mixes shapes; TransientError for a hub that
    does not answer.
    """
    files, notes = open_source(source)
    reader = _Reader(source, files)
    collector = _Collector(source.limit, seed)
    for number, file in enumerate(files):
        for place, row in reader.rows(number, file):
            collector.add(row, number, place)
    reader.check()
    prompts, repetitions = collector.finish([file.name for file in files], files[0].unit)
    for place, earlier in repetitions:
        reader.drops.add(REPETITION, place, f"repeats {earlier}")
    prompts, repeated_ids = _with_unique_ids(prompts)
    if repeated_ids:
        notes.append(f"{repeated_ids} rows have the prompt_id of an earlier row: they are numbered (id-2, id-3 ...)")
    ignored = [name for name in reader.names if name not in reader.used]
    notes += _notes_on(ignored)
    shape = "" if reader.shape is None else reader.shape.name
    return Reading(prompts, reader.count, reader.drops, notes, shape, list(reader.used), ignored)


def _notes_on(ignored: list[str]) -> list[str]:
    written = [name for name in ignored if WRITTEN_BY_A_POLICY.fullmatch(name)]
    other = [name for name in ignored if name not in written]
    notes = [f"columns that are not read: {', '.join(other)}"] if other else []
    if written:
        notes.append(
            f"{', '.join(written)}: answers that some policy wrote earlier are not read; a run samples its own"
        )
    return notes


class _Reader:
    """Raw rows -> rows of prompts; what is wrong with the others is counted."""

    def __init__(self, source: Source, files: list[RawFile]):
        self.source, self.files = source, files
        self.ours_to_theirs: dict[str, str] = {**source.columns}
        self.renamed = {theirs: ours for ours, theirs in self.ours_to_theirs.items()}
        self.drops = Drops()
        self.count = 0
        self.names: dict[str, None] = {}
        """Columns that any row has, in the order of their appearance."""
        self.used: dict[str, None] = {}
        self.shape: Shape | None = None
        self.first_place = ""
        self._known: dict[tuple[str, ...], Shape | None] = {}

    def rows(self, number: int, file: RawFile) -> Iterator[tuple[int, PromptRow]]:
        """The usable rows of a file, with their numbers in it."""
        chosen: list[str] | None = None
        if file.names is not None:
            if self._shape_of(tuple(file.names), number, 1) is None:
                self._refuse_columns()
            chosen = [name for name in file.names if name in self.used]
        for place, row in file.read(chosen):
            self.count += 1
            try:
                if isinstance(row, UnusableRow):
                    raise row
                prompt = self._row(row, number, place)
            except UnusableRow as error:
                example = str(error) if isinstance(row, UnusableRow) else _beginning(row)
                self.drops.add(error.reason, self._place(number, place), example)
            else:
                yield place, prompt

    def _place(self, file: int, number: int) -> str:
        return place_of([file.name for file in self.files], self.files[file].unit, file, number)

    def _row(self, row: dict[str, object], file: int, number: int) -> PromptRow:
        shape = self._shape_of(tuple(row), file, number)
        if shape is None:
            raise UnusableRow("no column holds a prompt", f"has the columns {', '.join(row) or 'none'}")
        if self.renamed:
            row = {ours: row[theirs] for theirs, ours in self.renamed.items() if theirs in row}
        return read_row(shape, row)

    def _shape_of(self, names: tuple[str, ...], file: int, number: int) -> Shape | None:
        """The shape of a row with these columns. Raises: ConfigError if it is not that of the rows before."""
        if names in self._known:
            return self._known[names]
        self.names |= dict.fromkeys(names)
        ours = [self.renamed[name] for name in names if name in self.renamed] if self.renamed else list(names)
        shape = shape_of(ours)
        self._known[names] = shape
        if shape is None:
            return None
        self.used |= dict.fromkeys(self.ours_to_theirs.get(name, name) for name in columns_read(shape, ours))
        if self.shape is None:
            self.shape, self.first_place = shape, self._place(file, number)
        if shape is not self.shape:
            raise ConfigError(
                f"{self.source} mixes shapes: {self.first_place} is read as {self.shape.name}, "
                f"{self._place(file, number)} as {shape.name} (its columns: {', '.join(names)}). "
                "Split it into sources of one shape each, and give them as a `mix`"
            )
        return shape

    def check(self) -> None:
        """Raises: ConfigError if nothing was read, with the reason that explains most."""
        if not self.count:
            raise ConfigError(f"the prompt file {self.source} is empty: at least one row is needed")
        if self.names and (self.shape is None or any(name not in self.names for name in self.renamed)):
            self._refuse_columns()
        if self.drops.unusable == self.count:
            raise ConfigError(f"{self.source}: none of its {self.count} rows can be used\n{self.drops.text()}")

    def _refuse_columns(self) -> NoReturn:
        missing = [name for name in self.renamed if name not in self.names]
        if missing:
            raise ConfigError(
                f"{self.source} has no column {missing[0]!r} (columns.{self.renamed[missing[0]]}); "
                f"it has {', '.join(self.names)}"
            )
        raise ConfigError(
            f"{self.source}: no column holds a prompt. It has {', '.join(self.names)}; a prompt is looked for in "
            "prompt, messages, conversations, instruction, real with generated, chosen with rejected. Say which it is, "
            "e.g. `columns: {prompt: question, response: answer}`"
        )


def _beginning(row: dict[str, object]) -> str:
    return ", ".join(f"{name}: {value!r:.40}" for name, value in row.items())


class _Collector:
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
        kept = np.asarray(self.kept, np.int64)
        is_chosen = np.isin(kept, first[: self.limit])
        chosen = np.flatnonzero(is_chosen)
        prompts = PromptSet(self.batches, everything.places[kept], files, unit).take(chosen)
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
        kept = np.asarray(self.kept, np.int64)
        stays = np.flatnonzero(np.asarray(self.digests, np.uint64)[kept] <= self.threshold)
        self.batches = PromptSet(self.batches, np.zeros((len(kept), 2)), [], "").take(stays).batches
        self.kept = array("q", kept[stays].tobytes())


def _with_unique_ids(prompts: PromptSet) -> tuple[PromptSet, int]:
    """Several rows of one prompt get ids of their own, id-2, id-3 ...; and how many of these ids had been written by
    somebody."""
    ids = prompts.column("prompt_id")
    hashes = np.fromiter(
        (hash(prompt_id) for chunk in ids.chunks for prompt_id in chunk.to_pylist()), np.int64, len(prompts)
    )
    if len(np.unique(hashes)) == len(prompts):
        return prompts, 0
    counts = Counter(ids.to_pylist())
    taken = set(counts)
    uses: dict[str, int] = {}
    written = 0

    def number(row: PromptRow) -> PromptRow:
        nonlocal written
        prompt_id = row["prompt_id"]
        if counts[prompt_id] < 2:
            return row
        uses[prompt_id] = uses.get(prompt_id, 0) + 1
        if uses[prompt_id] == 1:
            return row
        written += has_written_id(row)
        new_id = f"{prompt_id}-{uses[prompt_id]}"
        while new_id in taken:
            uses[prompt_id] += 1
            new_id = f"{prompt_id}-{uses[prompt_id]}"
        taken.add(new_id)
        return {**row, "prompt_id": new_id}

    return prompts.map(number), written
