"""Contracts - Parquet shards: one row schema per kind, written whole or not at all, read in a fixed order."""

# pyarrow's stubs leave out type arguments (IO, list, Field), so what comes from there counts as partially unknown:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ArtifactError, ContractError
from data_contracts.files import open_atomic
from data_contracts.identity import digest_file

TOKENS = pa.list_(pa.int32())
PER_TOKEN = pa.list_(pa.float32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


LARGE_SHARD_BYTES = 2**23
"""Larger shards are read in parts where rows pass by."""
ROWS_PER_PART = 2**14


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
        # The same prompt and chosen response, as the teacher's tokenizer cuts them; null: the method needs none.
        ("teacher_prompt_ids", TOKENS),
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
        # K*K row by row, entry [i][j] > 0: i beats j; null for scorers that look at one response at a time.
        ("preference_logits", pa.list_(pa.float64())),
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
    """Return where the shard number `index` lies.

    >>> shard_path(Path("."), 3)
    PosixPath('part-00003.parquet')
    """
    return directory / f"{prefix}-{index:05d}.parquet"


def seal_path(path: Path) -> Path:
    """Return where the digest of a shard lies. The file is hidden, so it is no data of the artifact."""
    return path.with_name(f".{path.name}.sha256")


def to_table(rows: Iterable[Mapping[str, Any]], kind: str) -> pa.Table:
    """Return rows as a table of the schema of `kind`. Raises: ContractError naming row and column that do not fit."""
    schema, rows = SCHEMAS[kind], list(rows)
    names, required = set(schema.names), [name for name in schema.names if not schema.field(name).nullable]
    for number, row in enumerate(rows):
        if set(row) != names:
            raise ContractError(f"{kind} row {number}: {_differing_columns(set(row), names)}")
        for name in required:
            if row[name] is None:
                expected = schema.field(name).type
                raise ContractError(f"{kind} row {number}: column {name} is empty; it must hold {expected}")
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        for number, row in enumerate(rows):  # the slow way, once, to name the value that does not fit
            for name in schema.names:
                try:
                    pa.array([row[name]], type=schema.field(name).type)
                except (pa.ArrowInvalid, pa.ArrowTypeError) as reason:
                    raise ContractError(f"{kind} row {number}, column {name}: {reason}") from None
        raise ContractError(f"{kind}: {error}") from None


def _differing_columns(names: set[str], expected: set[str]) -> str:
    """Return the columns that are missing and those that are unknown, in words."""
    differences = {"missing": expected - names, "unknown": names - expected}
    return "; ".join(f"{word} {sorted(columns)}" for word, columns in differences.items() if columns)


def write_shard(path: Path, table: pa.Table) -> None:
    """Write a shard in one step, on disk when the call returns: a shard that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        digest = digest_file(Path(file.name))
    # Parquet's own checksums leave out page headers and footer. A seal that a crash cut short
    # is not looked at.
    seal_path(path).write_text(digest)


def read_shard(path: Path, kind: str) -> pa.Table:
    """Return a shard. Raises: ArtifactError if it cannot be read, ContractError if its columns are of another kind."""
    with _damage_explained(path):
        _check_seal(path)
        # Without the checksums nine of ten flipped bits would be read as data. `pq.read_table` reads the same rows by
        # pyarrow.dataset, which imports pandas: 0.3 s of every command.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    _check_columns(path, table.schema, kind)
    return table


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """Return some columns of a shard of a finished artifact, whose digests have been compared. Raises: ArtifactError."""
    with _damage_explained(path), pq.ParquetFile(path) as file:
        return file.read(columns)


def shard_parts(path: Path, kind: str) -> Iterator[pa.Table]:
    """Yield the rows of a shard as tables, a large one (the prompts of a run are one shard) in parts. Raises: as
    `read_shard`."""
    if path.stat().st_size <= LARGE_SHARD_BYTES:
        yield read_shard(path, kind)
        return
    with _damage_explained(path):
        _check_seal(path)
        file = pq.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)
    _check_columns(path, file.schema_arrow, kind)
    with _damage_explained(path):
        for batch in file.iter_batches(ROWS_PER_PART):
            yield pa.Table.from_batches([batch], SCHEMAS[kind])


@contextmanager
def _damage_explained(path: Path) -> Generator[None]:
    """Raises: ArtifactError that says what to do, where reading `path` fails."""
    try:
        yield
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{path} cannot be read as Parquet ({error}). Delete it and run again: only this shard is made anew"
        ) from None


def _check_seal(path: Path) -> None:
    """Raises: ValueError if a shard is not what was written."""
    digest = _seal_of(path)
    if digest is not None and digest_file(path) != digest:
        raise ValueError("its content is not what was written")


def _seal_of(path: Path) -> str | None:
    """Return the digest that a shard's seal says; None without one, and for one that a crash cut short."""
    seal = seal_path(path)
    digest = seal.read_text(errors="replace") if seal.is_file() else ""
    return digest if len(digest) == 64 else None


def _check_columns(path: Path, schema: pa.Schema, kind: str) -> None:
    """Raises: ContractError if a shard has other columns than those of `kind`."""
    if schema.remove_metadata() != SCHEMAS[kind]:
        raise ContractError(
            f"{path}: the columns {schema.names} do not fit the contract of {kind} {SCHEMAS[kind].names}; "
            "another version wrote the shard. Delete the artifact and run again"
        )


def shard_is_whole(path: Path, kind: str) -> bool:
    """Return whether a shard that an earlier try left can be kept. A damaged one is deleted; one whose writer was killed
    before its seal was whole is sealed.
    """
    if not path.is_file():
        return False
    try:
        read_shard(path, kind)
    except (ArtifactError, ContractError):
        path.unlink()
        return False
    if _seal_of(path) is None:
        seal_path(path).write_text(digest_file(path))
    return True


def read_shards(directory: Path | str, kind: str, prefix: str = "part") -> pa.Table:
    """Return all shards of an artifact as one table, in shard order. Raises: ArtifactError if there is none."""
    return pa.concat_tables([read_shard(path, kind) for path in shard_paths(directory, kind, prefix)])


def count_rows(directory: Path) -> int:
    """Return the number of rows in the shards of an artifact."""
    return sum(pq.read_metadata(path).num_rows for path in sorted(directory.glob("part-*.parquet")))


def shard_paths(directory: Path | str, kind: str, prefix: str = "part") -> list[Path]:
    """Return the shards of an artifact, in order. Raises: ArtifactError if there is none."""
    paths = sorted(Path(directory).glob(f"{prefix}-*.parquet"))
    if not paths:
        raise ArtifactError(f"{directory} holds no {prefix}-*.parquet shard of {kind}")
    return paths
