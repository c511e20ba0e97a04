"""Contracts - the rows of artifacts that are too many to be held: read once, kept in a file, a few at a time in
memory."""

# pyarrow's stubs leave out type arguments (IO, list, Field), so what comes from there counts as partially unknown:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_contracts.shards import SCHEMAS, shard_parts, shard_paths

Row = dict[str, Any]
"""A row of a shard: its columns are those of SCHEMAS[kind]."""
Int64s = npt.NDArray[np.int64]
JOINED_BYTES = 2**26
"""Shards are joined up to this size: rows that lie in many small tables cost ten times as much as in few."""
RESIDENT_ROWS = 16
"""Rows that are read from the file before its pages are given back to the system, which maps 64 KiB around every value
that is touched."""
ROWS_AT_ONCE = 256
"""Rows that iteration makes at a time."""


class ShardRows(Sequence[Row]):
    """The rows of artifacts, one after the other, as dicts that are made on access.

    Few rows are held as columns. More than JOINED_BYTES of them go into a temporary file without a name (in TMPDIR),
    which is mapped into memory: a million rows then take no more memory than the last few that were read.
    """

    def __init__(self, directories: Iterable[Path | str], kind: str):
        """Raises: ArtifactError if a directory holds no shard or a damaged one, ContractError for other columns."""
        self._file: _MappedTables | None = None
        pending: list[pa.Table] = []
        num_bytes = 0
        paths = [path for directory in directories for path in shard_paths(directory, kind)]
        for table in (table for path in paths for table in shard_parts(path, kind)):
            pending.append(table)
            num_bytes += table.nbytes
            if num_bytes > JOINED_BYTES:
                if self._file is None:
                    self._file = _MappedTables(SCHEMAS[kind])
                self._file.add(_join(pending, SCHEMAS[kind]))
                num_bytes = 0
        if self._file is None:
            self.tables = [_join(pending, SCHEMAS[kind])]
        else:
            if pending:
                self._file.add(_join(pending, SCHEMAS[kind]))
            self.tables = self._file.close()
        self.ends: Int64s = np.cumsum([table.num_rows for table in self.tables])
        """Number of rows up to and including each table."""
        self._picked = 0

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return self.pick(range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.pick([index])[0]

    def pick(self, indices: Sequence[int] | Int64s) -> list[Row]:
        """Return these rows, in this order. Many at once cost a tenth of as many one by one."""
        row_numbers = np.asarray(indices, dtype=np.int64)
        table_numbers = np.searchsorted(self.ends, row_numbers, side="right")
        rows: list[Row] = [{}] * len(row_numbers)
        for number in np.unique(table_numbers):
            positions = np.flatnonzero(table_numbers == number)
            for position, row in zip(positions, self._take(int(number), row_numbers[positions]), strict=True):
                rows[position] = row
            self._picked += len(positions)
            if self._picked >= RESIDENT_ROWS:
                self._release()
        return rows

    def texts(self, name: str) -> Iterator[str]:
        """Yield the values of a text column of all rows."""
        for table in self.tables:
            yield from cast("list[str]", table.column(name).to_pylist())
            self._release()

    def _release(self) -> None:
        """Give the memory back that holds pages of the file."""
        self._picked = 0
        if self._file is not None:
            self._file.release()

    def _take(self, table_number: int, row_numbers: Int64s) -> list[Row]:
        """Return rows of one table, by their numbers among all rows."""
        table = self.tables[table_number]
        first = int(self.ends[table_number]) - table.num_rows
        return table.take(row_numbers - first).to_pylist()

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self[start : start + ROWS_AT_ONCE]


class RowsByPrompt:
    """Finds the rows of a prompt by its `prompt_id`, at 16 bytes a row."""

    def __init__(self, rows: ShardRows):
        self.rows = rows
        hashes = prompt_hashes(rows)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def counts(self, hashes: Int64s) -> Int64s:
        """Return how many rows each prompt has; prompts are given by `prompt_hashes`."""
        first, end = self._spans(hashes)
        return end - first

    def first_numbers(self, hashes: Int64s) -> Int64s:
        """Return the number of each prompt's first row; every prompt has one."""
        first, _ = self._spans(hashes)
        return self._order[first]

    def first_of_others(self, hashes: Int64s) -> Row | None:
        """Return the first row whose prompt is none of these; None if there is no such row."""
        ordered = np.sort(hashes)
        positions = np.minimum(np.searchsorted(ordered, self._hashes), len(ordered) - 1)
        others = self._order[ordered[positions] != self._hashes]
        return self.rows[int(others.min())] if len(others) else None

    def pick(self, prompt_ids: Sequence[str]) -> list[list[Row]]:
        """Return the rows of each of these prompts, in their order; [] for a prompt without rows."""
        hashes = np.fromiter(map(hash, prompt_ids), np.int64, len(prompt_ids))
        numbers = [self._order[first:end] for first, end in zip(*self._spans(hashes), strict=True)]
        rows = iter(self.rows.pick(np.concatenate([np.zeros(0, np.int64), *numbers])))
        # Two ids may have one hash: what the row says decides.
        return [
            [row for row in islice(rows, len(numbers[position])) if row["prompt_id"] == prompt_id]
            for position, prompt_id in enumerate(prompt_ids)
        ]

    def _spans(self, hashes: Int64s) -> tuple[Int64s, Int64s]:
        """Return the places in `_order` where the rows of each prompt begin and end."""
        first, end = (np.searchsorted(self._hashes, hashes, side=side) for side in ("left", "right"))
        return first, end


def prompt_hashes(rows: ShardRows) -> Int64s:
    """Return a number for the `prompt_id` of every row: equal ids have equal ones, within this process."""
    return np.fromiter(map(hash, rows.texts("prompt_id")), np.int64, len(rows))


class _MappedTables:
    """Tables in a temporary file that is mapped into memory; the file goes with the object."""

    def __init__(self, schema: pa.Schema):
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is mapped
        self._writer = pa.ipc.new_file(self._file, schema)
        self._map: mmap.mmap | None = None

    def add(self, table: pa.Table) -> None:
        """Append a table of one chunk per column."""
        self._writer.write_table(table)

    def close(self) -> list[pa.Table]:
        """Return the tables that were added; nothing can be added any more."""
        self._writer.close()
        self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
        return [pa.Table.from_batches([reader.get_batch(number)]) for number in range(reader.num_record_batches)]

    def release(self) -> None:
        """Give the pages back that were read. They are read again from the file when they are needed."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _join(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    """Return one table of one chunk per column; empties `tables` on the way, to hold no column twice for long."""
    columns: list[pa.Array[Any]] = []
    for name in schema.names:
        chunks = [chunk for table in tables for chunk in table.column(name).chunks]
        tables[:] = [table.drop_columns([name]) for table in tables]
        columns.append(pa.chunked_array(chunks, schema.field(name).type).combine_chunks())
        del chunks
    tables.clear()
    return pa.table(columns, schema=schema)
