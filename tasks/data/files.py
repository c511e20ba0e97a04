"""Tasks - the files behind a source, whatever their format: each as a stream of rows that nobody has looked at yet.

Local files are read by this room and pyarrow; saved and hub data sets, and the splits of a directory, by the library
`datasets`.
"""

from __future__ import annotations

import glob
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.errors import ConfigError, TransientError
from data_contracts.installation import provided
from data_contracts.prompts import UnusableRow
from tasks.data.source import Source
from tasks.data.text_files import COMPRESSION, Row, csv_rows, json_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

BATCH = 1000
FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
}
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
DEFAULT_SPLIT = "train"
SHOWN_FILES = 5


class RawFile(NamedTuple):
    """One file, or one split of a data set."""

    name: str
    unit: str
    """What its rows are called: line, or row."""
    names: list[str] | None
    """Names of all its columns, where the format says them in front."""
    read: Callable[[Sequence[str] | None], Iterator[tuple[int, Row]]]
    """Rows with their numbers, from 1; of these columns only, where the format can."""


def open_source(source: Source) -> tuple[list[RawFile], list[str]]:
    """The files of a source that is no mix, and what there is to say about the choice.

    Raises: ConfigError for what is not there, cannot be read or is ambiguous; TransientError for a hub that does not
    answer.
    """
    if source.hub_id is not None:
        return _split_of(_from_hub(source), source)
    assert source.path is not None
    path = Path(provided(source.path)).expanduser()
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return _matching(source, path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the prompts {source.path!r}: {getattr(error, 'strerror', error)}") from None
    if stat.S_ISDIR(mode):
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _split_of(_saved(path), source)
        return _directory(source, path)
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is a pipe or a device: prompts are read more than once, so give a file")
    _refuse_split(source)
    return [_open(path)], []


def _matching(source: Source, path: Path) -> tuple[list[RawFile], list[str]]:
    """The files that a glob means."""
    if not glob.has_magic(str(path)):
        hint = (
            f". A data set of the hub is written {{hub_id: {source.path}}}" if str(source.path).count("/") == 1 else ""
        )
        raise ConfigError(f"cannot read the prompt file {source.path}: No such file or directory{hint}")
    paths = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not paths:
        raise ConfigError(f"no file matches {source.path}")
    _refuse_split(source)
    return [_open(path) for path in paths], []


def _directory(source: Source, path: Path) -> tuple[list[RawFile], list[str]]:
    """The files of one split of a directory of data files, as `datasets` tells splits from names."""
    datasets = _datasets(source)
    try:
        by_split = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:  # the library has no common base class
        raise ConfigError(f"{path} is no directory of data files: {_first_line(error)}") from None
    split, notes = _choose(list(map(str, by_split)), source)
    split_paths = {Path(name).resolve() for names in by_split.values() for name in names}
    others = [file for file in sorted(path.rglob("*")) if _kind_of(file) and file.resolve() not in split_paths]
    if others:  # the library reads files of one format
        notes.append(f"{path}: not read: {', '.join(str(file.relative_to(path)) for file in others[:SHOWN_FILES])}")
    return [_open(Path(name)) for name in by_split[split]], notes


def _kind_of(path: Path) -> str | None:
    """The format that a file's name says; None: no format of data."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSION]
    return FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _open(path: Path) -> RawFile:
    kind = _kind_of(path)
    with open(path, "rb") as file:
        beginning = file.read(8)
    kind = next((kind for magic, kind in MAGIC.items() if beginning.startswith(magic)), kind)
    if not beginning:
        raise ConfigError(f"{path} is empty: at least one row is needed")
    if kind is None:
        raise ConfigError(
            f"{path}: cannot tell the format from the name; known are {', '.join(FORMATS)}, "
            f"text also compressed ({', '.join(COMPRESSION)})"
        )
    if kind in ("json", "csv"):
        return RawFile(str(path), "line", None, partial(_text_rows, json_rows if kind == "json" else csv_rows, path))
    if kind == "parquet":
        return _parquet(path)
    return _arrow(path)


def _text_rows(
    read: Callable[[Path], Iterator[tuple[int, Row]]], path: Path, columns: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    try:
        yield from read(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from None


def _parquet(path: Path) -> RawFile:
    try:
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {_first_line(error)}") from None
    return RawFile(
        str(path), "row", file.schema_arrow.names, partial(_table_rows, str(path), partial(_parquet_batches, file))
    )


def _parquet_batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    yield from file.iter_batches(BATCH, columns=list(columns))


def _arrow(path: Path) -> RawFile:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    try:
        source = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(source)
            batches = partial(map, file.get_batch, range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            file = pa.ipc.open_stream(source)
            batches = partial(iter, file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as Arrow: {_first_line(error)}") from None

    def read(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in batches():
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH).select(list(columns))

    return RawFile(str(path), "row", file.schema.names, partial(_table_rows, str(path), read))


def _table_rows(
    name: str, batches: Callable[[Sequence[str]], Iterator[pa.RecordBatch | pa.Table]], columns: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        for batch in batches(columns or []):
            for row in _rows_of(batch):
                number += 1
                yield number, row
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{name} cannot be read behind row {number}: {_first_line(error)}") from None


def _rows_of(batch: pa.RecordBatch | pa.Table) -> list[Row]:
    try:
        return cast("list[Row]", batch.to_pylist())
    except ValueError:  # bytes that are no text, times that no calendar has
        if batch.num_rows > 1:
            return [row for start in range(batch.num_rows) for row in _rows_of(batch.slice(start, 1))]
        return [
            UnusableRow("the text cannot be decoded", "holds bytes that are not UTF-8, or a value that cannot be read")
        ]


# --- the library


def _datasets(origin: object) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"reading {origin} needs the library `datasets`, which this environment lacks: pip install "
            "'datasets>=5.2', or give a file"
        ) from None
    return datasets


def _saved(path: Path) -> Dataset | DatasetDict:
    datasets = _datasets(path)
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # the library has no common base class
        raise ConfigError(f"{path} cannot be read as a saved data set: {_first_line(error)}") from None


def _from_hub(source: Source) -> Dataset | DatasetDict:
    datasets = _datasets(source)
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return datasets.load_dataset(source.hub_id, source.name, revision=source.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ConfigError(f"the hub has no data set {source}, or it is gated: {_first_line(error)}") from None
    except (ConnectionError, HfHubHTTPError) as error:
        if isinstance(error, OfflineModeIsEnabled) or datasets.config.HF_HUB_OFFLINE:
            raise ConfigError(
                f"the data set {source} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: "
                "unset it, or give a path"
            ) from None
        raise TransientError(
            f"the data set {source} could not be fetched and is not in the local cache: {_first_line(error)}"
        ) from None
    except (
        Exception
    ) as error:  # unknown configurations, broken files, scripts: ValueError, RuntimeError and the library's own
        raise ConfigError(f"the data set {source} cannot be read: {_first_line(error)}") from None


def _split_of(data: Dataset | DatasetDict, source: Source) -> tuple[list[RawFile], list[str]]:
    notes: list[str] = []
    if isinstance(data, dict):
        split, notes = _choose([str(split) for split in data], source)
        data = data[split]
    elif source.split is not None and source.split != str(data.split or source.split):
        raise ConfigError(f"{source.path} has no split {source.split}: it is the split {data.split}")
    dataset: Any = data

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        yield from dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH)

    name = str(source)
    return [RawFile(name, "row", list(dataset.column_names), partial(_table_rows, name, read))], notes


def _choose(splits: list[str], source: Source) -> tuple[str, list[str]]:
    """The split that is named, or the one meant without a name."""
    origin = source.path or source.hub_id
    if source.split is not None:
        if source.split not in splits:
            raise ConfigError(f"{origin} has no split {source.split!r}; there are {', '.join(splits)}")
        return source.split, []
    if len(splits) == 1:
        return splits[0], []
    if DEFAULT_SPLIT not in splits:
        raise ConfigError(f"{origin} has the splits {', '.join(splits)}: say which with `split`")
    others = [split for split in splits if split != DEFAULT_SPLIT]
    return DEFAULT_SPLIT, [
        f"{origin}: the split {DEFAULT_SPLIT} is read; not read: {', '.join(others)} (`split` names another)"
    ]


def _refuse_split(source: Source) -> None:
    if source.split is not None:
        raise ConfigError(f"{source.path} is a file and has no splits: remove `split: {source.split}`")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
