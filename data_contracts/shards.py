"""Contracts - Parquet shards: one row schema per kind, written whole or not at all, read in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ArtifactError, ContractError
from data_contracts.files import open_atomic
from data_contracts.identity import digest_file

TOKENS = pa.list_(pa.int32())
PER_TOKEN = pa.list_(pa.float32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _schema(*fields: tuple[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in fields])


_PREFERENCE = (
    ("score_chosen", pa.float64()),
    ("score_rejected", pa.float64()),
    ("win_rate_chosen", pa.float64()),  # against all K candidates, self counted 1/2
    ("win_rate_rejected", pa.float64()),
    ("chosen_candidate", pa.int32()),  # its number among the K; -1: not one of them
    ("rejected_candidate", pa.int32()),
    ("group_scores", pa.list_(pa.float64())),  # of all K candidates, for methods that compare inside the group
    ("group_win_rates", pa.list_(pa.float64())),
)
_UNSCORED = ("score_chosen", "score_rejected", "group_scores", "group_win_rates")

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": _schema(
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("checks", pa.string()),  # JSON list of verifiable instructions, "[]" for none
        ("response", pa.string()),  # ground truth, for SPIN and SWIFT
        ("chosen", pa.string()),  # a given pair, for the offline methods
        ("rejected", pa.string()),
        ("source", pa.string()),
        nullable=("response", "chosen", "rejected"),
    ),
    "generations": _schema(
        ("prompt_id", pa.string()),
        ("candidate", pa.int32()),
        ("prompt_ids", TOKENS),
        ("token_ids", TOKENS),  # with the EOS that ended it, if one did
        ("token_logps", PER_TOKEN),  # the sampler's own, before temperature; nats
        ("finish_reason", pa.string()),  # "stop" or "length"
        ("seed", pa.int64()),
        ("completion", pa.string()),  # for people and text scorers; training uses token_ids
    ),
    "scored_pairs": _schema(
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_ids", TOKENS),
        ("chosen_ids", TOKENS),
        ("rejected_ids", TOKENS),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        *_PREFERENCE,
        ("scorer", pa.string()),
        nullable=_UNSCORED,
    ),
    "weighted_pairs": _schema(
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_ids", TOKENS),
        ("chosen_ids", TOKENS),
        ("chosen_reference_logps", PER_TOKEN),  # null: the method needs none; likewise old_logps
        ("chosen_old_logps", PER_TOKEN),  # under the policy that sampled it
        ("chosen_weights", PER_TOKEN),
        ("rejected_ids", TOKENS),  # empty for methods on single responses, and then the columns below are too
        ("rejected_reference_logps", PER_TOKEN),
        ("rejected_old_logps", PER_TOKEN),
        ("rejected_weights", PER_TOKEN),
        (
            "teacher_prompt_ids",
            TOKENS,
        ),  # the same prompt and chosen response as the teacher's tokenizer cuts them; null: not needed
        ("teacher_ids", TOKENS),
        *_PREFERENCE,
        nullable=(
            *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("reference_logps", "old_logps")),
            "teacher_prompt_ids",
            "teacher_ids",
            *_UNSCORED,
        ),
    ),
    "token_logps": _schema(
        ("key", pa.binary(16)),  # digest of prompt and response ids
        ("logps", PER_TOKEN),  # NaN where the model's context ended
    ),
    "scores": _schema(
        ("prompt_id", pa.string()),
        ("scores", pa.list_(pa.float64())),  # one per candidate, null = could not be scored
        (
            "preference_logits",
            pa.list_(pa.float64()),
        ),  # K*K row by row, entry [i][j] > 0: i beats j; null for pointwise scorers
        ("reasons", pa.list_(pa.string())),  # why a candidate has no score, or what spoilt it; "" for none
        nullable=("scores", "preference_logits"),
    ),
    "dropped": _schema(("prompt_id", pa.string()), ("reason", pa.string())),
    "eval_report": _schema(
        ("suite", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("low", pa.float64()),  # 95 % interval
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("n_shot", pa.int32()),
        ("task_version", pa.string()),
        nullable=("stderr", "low", "high", "n_shot"),
    ),
    "heldout": _schema(
        ("prompt_id", pa.string()),
        ("candidate", pa.int32()),
        ("completion", pa.string()),
        ("score", pa.float64()),
        ("num_tokens", pa.int32()),
        ("finished", pa.bool_()),
        ("start_logp", pa.float64()),  # mean per token under the start model: the fluency measure
        nullable=("score", "start_logp"),
    ),
}


def shard_path(directory: Path, index: int, prefix: str = "part") -> Path:
    return directory / f"{prefix}-{index:05d}.parquet"


def to_table(rows: Iterable[Mapping[str, Any]], kind: str) -> pa.Table:
    """Rows under the schema of `kind`. Raises: ContractError naming row and column where one does not fit."""
    schema, rows = SCHEMAS[kind], list(rows)
    for number, row in enumerate(rows):
        if row.keys() != set(schema.names):
            missing, extra = set(schema.names) - row.keys(), row.keys() - set(schema.names)
            raise ContractError(
                f"{kind} row {number}: "
                + "; ".join(
                    f"{word} {sorted(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names
                )
            )
        for field in schema:
            if row[field.name] is None and not field.nullable:
                raise ContractError(f"{kind} row {number}: column {field.name} is empty; it must hold {field.type}")
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        for number, row in enumerate(rows):  # the slow way, once, to name the culprit
            for field in schema:
                try:
                    pa.array([row[field.name]], type=field.type)
                except (pa.ArrowInvalid, pa.ArrowTypeError) as inner:
                    raise ContractError(f"{kind} row {number}, column {field.name}: {inner}") from None
        raise ContractError(f"{kind}: {error}") from None


def seal_path(path: Path) -> Path:
    """Beside a shard: the digest that it was written with. Hidden, so it is no data of the artifact."""
    return path.with_name(f".{path.name}.sha256")


def write_shard(path: Path, table: pa.Table) -> None:
    """Write, flush to disk, then rename: a shard that exists is a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        digest = digest_file(Path(file.name))
    # Parquet's own checksums leave out page headers and footer. A seal that a crash cut, or kept from being made, is no seal.
    seal_path(path).write_text(digest)


def read_shard(path: Path, kind: str) -> pa.Table:
    """Raises: ArtifactError if it cannot be read, ContractError if its columns are not those of `kind`."""
    seal = seal_path(path)
    try:
        if seal.is_file() and len(wanted := seal.read_text(errors="replace")) == 64 and digest_file(path) != wanted:
            raise ValueError("it is not what was written")
        # Without the checksums nine of ten flipped bits would be read as data.
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} cannot be read as Parquet ({error}). Delete it and run again: only this shard is made anew"
        ) from None
    if table.schema.remove_metadata() != SCHEMAS[kind]:
        raise ContractError(
            f"{path}: columns {table.schema.names} do not fit the contract of {kind} {SCHEMAS[kind].names}; it was written by another version"
        )
    return table


def shard_is_whole(path: Path, kind: str) -> bool:
    """Whether a shard left by an earlier try can be kept. A damaged one is removed."""
    if not path.is_file():
        return False
    try:
        read_shard(path, kind)
    except (ArtifactError, ContractError):
        path.unlink()
        return False
    return True


def read_shards(directory: Path | str, kind: str, prefix: str = "part") -> pa.Table:
    """All shards of an artifact as one table, in shard order. Raises: ArtifactError if there is none."""
    return pa.concat_tables([read_shard(path, kind) for path in _shards_of(directory, kind, prefix)])


def _shards_of(directory: Path | str, kind: str, prefix: str) -> list[Path]:
    paths = sorted(Path(directory).glob(f"{prefix}-*.parquet"))
    if not paths:
        raise ArtifactError(f"{directory} holds no {prefix}-*.parquet shard of {kind}")
    return paths


class ShardRows(Sequence[dict[str, Any]]):
    """The rows of artifacts, one after the other, as dicts that are made when they are asked for: columns take a tenth of the memory.

    Shards are joined as they are read, 128 MiB at a time: thousands of small buffers take twice the memory, and rows that lie
    in many tables cost ten times as much as rows that lie in few.
    """

    def __init__(self, directories: Iterable[Path | str], kind: str):
        self.tables: list[pa.Table] = []
        waiting: list[pa.Table] = []
        size = 0
        for path in [path for directory in directories for path in _shards_of(directory, kind, "part")]:
            waiting.append(read_shard(path, kind))
            size += waiting[-1].nbytes
            if size > JOINED_BYTES:
                self.tables.append(_joined(waiting))
                size = 0
        if waiting:
            self.tables.append(_joined(waiting))
        self.ends = np.cumsum([table.num_rows for table in self.tables])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.pick(range(*index.indices(len(self))))
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.pick([index])[0]

    def pick(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """These rows, in this order. Many at once cost a tenth of as many one by one."""
        places = np.asarray(indices, dtype=np.int64)
        of = np.searchsorted(self.ends, places, side="right")
        rows: list[Any] = [None] * len(places)
        for number in np.unique(of):
            for place, row in zip(
                np.flatnonzero(of == number), self._take(int(number), places[of == number]), strict=True
            ):
                rows[place] = row
        return rows

    def _take(self, number: int, places: np.ndarray) -> list[dict[str, Any]]:
        table = self.tables[number]
        return table.take(places - (int(self.ends[number]) - table.num_rows)).to_pylist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), 256):
            yield from self[start : start + 256]


JOINED_BYTES = 2**27
"""Far below the 2^31 elements that one list column can have."""


def _joined(tables: list[pa.Table]) -> pa.Table:
    """One table of one chunk; `tables` is emptied on the way, so that no column is held twice for long."""
    schema = tables[0].schema
    columns = []
    for name in schema.names:
        chunks = [chunk for table in tables for chunk in table.column(name).chunks]
        tables[:] = [table.drop_columns([name]) for table in tables]
        columns.append(pa.chunked_array(chunks, schema.field(name).type).combine_chunks())
        del chunks
    tables.clear()
    return pa.table(columns, schema=schema)


def count_rows(directory: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in sorted(directory.glob("part-*.parquet")))
