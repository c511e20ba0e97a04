"""Tasks - rows of text files: JSON lines, a JSON array, CSV; compressed or not, one row at a time.

A file is read as a stream: a million rows, or a file that never ends, take no more memory than one row.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from data_contracts.errors import ConfigError
from data_contracts.prompts import UnusableRow, parse_object

LONGEST_ROW = 64 * 2**20
"""Bytes. A longer line is no prompt: a file without line ends, a dump, a device."""
COMPRESSION = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CHUNK = 2**20
TOO_LONG = f"is longer than {LONGEST_ROW >> 20} MiB"

Row = dict[str, Any] | UnusableRow


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a text file, uncompressed. Raises: ConfigError for a file that is no text."""
    stream: Any = COMPRESSION.get(path.suffix, open)(path, "rb")
    beginning = stream.read(4096)
    stream.seek(0)
    if b"\0" in beginning:
        stream.close()
        raise ConfigError(
            f"{path} is not text: it holds zero bytes. JSON lines, JSON and CSV in UTF-8 are read, and Parquet "
            "(.parquet) and Arrow (.arrow) files"
        )
    if beginning.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a file of JSON lines, or of one JSON array, with the numbers of their lines or items."""
    with open_text(path) as stream:
        start = stream.tell()
        is_array = stream.read(4096).lstrip().startswith(b"[")
        stream.seek(start)
        yield from _array_items(path, stream) if is_array else _json_lines(path, stream)


def _json_lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        try:
            yield number, parse_object(line)
        except UnusableRow as error:
            yield number, error


def _lines(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Lines without their ends, as an editor counts them. A byte that is not UTF-8 becomes half of a surrogate pair,
    which no text may hold."""
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise ConfigError(f"{path} line {number} {TOO_LONG}: JSON lines hold one row in each line")
        yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _array_items(path: Path, stream: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """Items of a JSON array, decoded one by one: the whole text is never held."""
    decoder = json.JSONDecoder()
    decode_bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, position, number, ended = decode_bytes(stream.read(CHUNK)).lstrip()[1:], 0, 0, False

    def more() -> None:
        nonlocal text, position, ended
        # As much again as is waiting: an item of n bytes is tried log2(n / chunk) times.
        data = stream.read(max(CHUNK, len(text) - position))
        ended = not data
        text, position = text[position:] + decode_bytes(data, ended), 0

    while True:
        while (position := _skip(text, position)) == len(text) and not ended:
            more()
        if position == len(text):
            raise ConfigError(f"{path} ends inside of its JSON array, after {number} items: the file is cut")
        if text[position] == "]":
            if text[position + 1 :].strip() or any(block.strip() for block in iter(partial(stream.read, CHUNK), b"")):
                raise ConfigError(
                    f"{path} goes on behind the end of its JSON array, after {number} items: give one array, or one "
                    "object in each line"
                )
            return
        number += 1
        while True:
            try:
                item, end = decoder.raw_decode(text, position)
                if end < len(text) or ended:
                    break
            except json.JSONDecodeError as error:
                if ended:
                    raise ConfigError(
                        f"{path} item {number} of the JSON array is not valid JSON: {error.msg}: mend or remove it"
                    ) from None
            except (RecursionError, ValueError) as error:
                raise ConfigError(f"{path} item {number} of the JSON array cannot be read: {error}") from None
            if len(text) - position > LONGEST_ROW:
                raise ConfigError(f"{path} item {number} of the JSON array {TOO_LONG}, or is not valid JSON")
            more()
        position = end
        message = f"must be a JSON object, got {type(item).__name__}"
        yield number, item if isinstance(item, dict) else UnusableRow("an item is not a JSON object", message)


def _skip(text: str, position: int) -> int:
    """The position of the next character that is neither blank nor a comma."""
    while position < len(text) and text[position] in " \t\r\n,":
        position += 1
    return position


def csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a spreadsheet whose first line names the columns; all values are text. A row's number is that of its last
    line.

    The columns are separated by whichever of comma, semicolon and tab the first line has most of.
    """
    csv.field_size_limit(LONGEST_ROW)
    with open_text(path) as stream:
        lines = (line + "\n" for _, line in _lines(path, stream))
        first = next(lines, "")
        delimiter = max(",;\t", key=first.count)
        header = next(csv.reader([first], delimiter=delimiter), [])
        is_spaced = any(name.startswith(" ") for name in header)  # `prompt, response`
        if is_spaced:
            header = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))
        header = [name.strip() for name in header]
        if len(set(header)) < len(header):
            raise ConfigError(f"{path}: the first line must name the columns, each once, got {header!r:.200}")
        is_at_end = False

        def watched() -> Iterator[str]:
            nonlocal is_at_end
            yield from lines
            is_at_end = True

        reader = csv.reader(watched(), delimiter=delimiter, skipinitialspace=is_spaced)
        while True:
            start = reader.line_num + 2
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num + 1, UnusableRow("the line is not valid CSV", f"is not valid CSV: {error}")
                continue
            if is_at_end:  # the reader asked for another line: everything up to here is one cell
                raise ConfigError(
                    f"{path}: a quote that opens in the row at line {start} is never closed, and takes in the "
                    f"{reader.line_num + 1 - start} lines below: close it, or double the quotes inside of a text"
                )
            if len(cells) == len(header):
                yield reader.line_num + 1, dict(zip(header, cells, strict=True))
            elif cells:
                reason = "the line has more or fewer cells than the first one"
                yield reader.line_num + 1, UnusableRow(reason, f"has {len(cells)} cells, the first line {len(header)}")
