"""Tasks - many rows of prompts, held as columns, each with the place that it was read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
from pyarrow.lib import StringBuilder

from data_contracts.prompts import Message, PromptRow
from data_contracts.shards import MESSAGES, SCHEMAS

BATCH = 1000


class PromptSet(Sequence[PromptRow]):
    """Rows under the schema of `prompts`. A row becomes a dict when it is asked for: columns take a tenth of the
    memory."""

    def __init__(self, batches: Sequence[pa.RecordBatch], places: np.ndarray, files: Sequence[str], unit: str):
        """batches: rows, at most BATCH in each; places: [rows, 2] number of the file, and of the row in it from 1;
        unit: line or row."""
        self.batches = [batch for batch in batches if batch.num_rows]
        self.places, self.files, self.unit = places, files, unit
        self.ends = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)
        self.counts: Mapping[str, float] = {}
        """What a record says of the source: its rows, and how many of them were dropped for which reason."""

    @classmethod
    def of(
        cls,
        rows: Sequence[PromptRow],
        places: np.ndarray | None = None,
        files: Sequence[str] = ("rows",),
        unit: str = "row",
    ) -> PromptSet:
        """Rows that are dicts now; by default, such that come from no file."""
        batches = [batch_of(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        if places is None:
            places = np.column_stack([np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1)])
        return cls(batches, places, files, unit)

    @classmethod
    def joined(cls, parts: Sequence[PromptSet]) -> PromptSet:
        """The rows of several sets, one after the other."""
        files: list[str] = []
        places: list[np.ndarray] = []
        for part in parts:
            places.append(part.places + np.array([len(files), 0]))
            files += part.files
        return cls([batch for part in parts for batch in part.batches], np.concatenate(places), files, parts[0].unit)

    def __len__(self) -> int:
        if len(self.ends):
            return int(self.ends[-1])
        return 0

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> PromptRow | PromptSet:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.ends, index, side="right"))
        batch = self.batches[number]
        row = batch.slice(index - (int(self.ends[number]) - batch.num_rows), 1)
        return cast("list[PromptRow]", row.to_pylist())[0]

    def __iter__(self) -> Iterator[PromptRow]:
        for batch in self.batches:
            yield from cast("list[PromptRow]", batch.to_pylist())

    def take(self, indices: np.ndarray) -> PromptSet:
        """These rows; the indices rise."""
        assert (np.diff(indices) > 0).all(), "a prompt set keeps its order"
        if len(indices) == len(self):
            return self  # with the digest that it may have, which costs 20 us a row
        parts: list[pa.RecordBatch] = []
        start = 0
        for batch, end in zip(self.batches, self.ends, strict=True):
            first, last = np.searchsorted(indices, [start, end])
            if last - first == batch.num_rows:
                parts.append(batch)
            elif last > first:
                parts.append(batch.take(_int64s(indices[first:last] - start)))
            start = end
        return self._with(parts, self.places[indices])

    def map(self, change: Callable[[int, PromptRow], PromptRow]) -> PromptSet:
        """The same rows, changed by a function of number and row; each keeps its place."""
        rows = enumerate(self)
        batches = [batch_of([change(*next(rows)) for _ in range(batch.num_rows)]) for batch in self.batches]
        return self._with(batches, self.places)

    def _with(self, batches: Sequence[pa.RecordBatch], places: np.ndarray) -> PromptSet:
        """Other rows of the same source."""
        prompts = PromptSet(batches, places, self.files, self.unit)
        prompts.counts = self.counts
        return prompts

    def write(self, path: Path) -> None:
        """An Arrow file of all rows."""
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMAS["prompts"]) as writer:
            for batch in self.batches:
                writer.write_batch(batch)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows."""
        return pa.chunked_array([batch.column(name) for batch in self.batches], SCHEMAS["prompts"].field(name).type)

    def table(self) -> pa.Table:
        """All rows, in chunks as large as can be."""
        return pa.Table.from_batches(self.batches, SCHEMAS["prompts"]).combine_chunks()

    def where(self, index: int) -> str:
        """The place of a row in its file, e.g. `line 12`."""
        return place_of(self.files, self.unit, *map(int, self.places[index]))

    def file_of(self, index: int) -> str:
        """The name of a row's file."""
        return self.files[int(self.places[index][0])]

    @cached_property
    def digest(self) -> str:
        """sha256 of the rows' canonical JSON: `digest_text(canonical_json(rows))`, without the text."""
        digest = hashlib.sha256(b"[")
        for number, row in enumerate(self):
            digest.update(b"," if number else b"")
            digest.update(canonical_row(row).encode())
        digest.update(b"]")
        return digest.hexdigest()


def _int64s(numbers: np.ndarray) -> pa.Array:
    """The numbers as Arrow has them. `pa.array` makes the same, and imports pandas first."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers.astype(np.int64).tobytes())])


def batch_of(rows: Sequence[PromptRow]) -> pa.RecordBatch:
    """Rows as columns. `RecordBatch.from_pylist` makes the same, and imports pandas first: a third of `selfplay status`."""
    schema = SCHEMAS["prompts"]
    columns: list[pa.Array] = []
    for field in schema:
        values: list[Any] = [cast("dict[str, Any]", row).get(field.name) for row in rows]
        columns.append(_conversations(values) if field.name == "messages" else _texts(values))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _texts(values: Iterable[str | None]) -> pa.Array:
    builder = StringBuilder()
    builder.append_values(values)
    return builder.finish()


def _conversations(conversations: Sequence[Sequence[Message]]) -> pa.Array:
    """A column of the type MESSAGES."""
    turns = [turn for messages in conversations for turn in messages]
    texts = [_texts(turn[name] for turn in turns) for name in ("role", "content")]
    ends = np.cumsum([0, *map(len, conversations)], dtype=np.int32)
    offsets = pa.Array.from_buffers(pa.int32(), len(ends), [None, pa.py_buffer(ends.tobytes())])
    return pa.ListArray.from_arrays(
        cast("pa.Int32Array", offsets), pa.StructArray.from_arrays(texts, fields=list(MESSAGES.value_type))
    )


def canonical_row(row: PromptRow) -> str:
    """`canonical_json` of a row, which holds texts, lists and nulls only: at a third of the time."""
    return json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def place_of(files: Sequence[str], unit: str, file: int, number: int) -> str:
    """`line 12`; with the file's name where there are several."""
    if len(files) < 2:
        return f"{unit} {number}"
    return f"{files[file]} {unit} {number}"
