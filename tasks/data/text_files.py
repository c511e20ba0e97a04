"""Tasks - rows of text files: JSON lines, a JSON array, CSV; compressed or not, one row at a time.

A file is read as a stream: a million rows, or a file that never ends, take no more memory than one row.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from data_contracts.errors import ConfigError
from data_contracts.prompts import UnusableRow, parse_object
from tasks.data.shapes import shape_of

LONGEST_ROW = 64 * 2**20
"""Bytes. A longer line is no prompt: a file without line ends, a dump, a device."""


class Zstandard(io.RawIOBase):
    """The uncompressed bytes of a .zst file, to be read from its beginning, again and again if need be."""

    def __init__(self, path: Path):
        self._path = str(path)
        self._source, self._position = pa.input_stream(self._path, compression="zstd"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a place from the beginning, in a stream that only goes forward."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the beginning")
        if offset < self._position:
            self._source, self._position = pa.input_stream(self._path, compression="zstd"), 0
        self._position += len(self._source.read(offset - self._position))
        return self._position


def open_zstandard(path: Path, mode: str) -> IO[bytes]:
    """The uncompressed bytes of a .zst file."""
    return io.BufferedReader(Zstandard(path))


COMPRESSION = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstandard}
CHUNK = 2**20
BLANKS = " \t\r\n"
TOO_LONG = f"is longer than {LONGEST_ROW >> 20} MiB"

Row = dict[str, Any] | UnusableRow


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a text file, uncompressed. Raises: ConfigError for a file that is no text."""
    stream: Any = COMPRESSION.get(path.suffix, open)(path, "rb")
    beginning = stream.read(4096)
    stream.seek(0)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.close()
        raise ConfigError(f"{path} is text in UTF-16, and UTF-8 is read: iconv -f UTF-16 -t UTF-8 {path} > FILE")
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
    """Rows with the numbers of their lines or items: of JSON lines, one JSON array, one object that holds such an array
    beside other things, one object that is a row, or objects one after the other that take several lines each.

    Raises: ConfigError for an object that holds several arrays of rows.
    """
    with open_text(path) as stream:
        start = stream.tell()
        beginning = stream.read(4096).lstrip()
        stream.seek(start)
        if beginning.startswith(b"["):
            yield from _array_items(path, _JsonText(stream))
            return
        layout = _Layout.of(stream) if beginning.startswith(b"{") else _Layout(False, None)
        stream.seek(start)
        if layout.arrays is None:
            yield from _objects(path, _JsonText(stream)) if layout.is_document else _json_lines(path, stream)
            return
        if len(layout.arrays) > 1:
            raise ConfigError(
                f"{path} is one JSON object with {len(layout.arrays)} lists of rows: {', '.join(layout.arrays)}. Give a "
                "file of its own to each"
            )
        text = _JsonText(stream)
        for name in text.names():
            if name == layout.arrays[0]:
                yield from _array_items(path, text, name)
                return
            text.skip_value()


class _Layout(NamedTuple):
    """How a file whose first character is a brace holds its rows."""

    is_document: bool
    """False: as JSON lines. True: as objects that may take several lines each."""
    arrays: list[str] | None
    """The lists of rows in the one object of the file; None: each object is a row."""

    @classmethod
    def of(cls, stream: IO[bytes]) -> _Layout:
        start = stream.tell()
        line = b" "
        while line and not line.strip():
            line = stream.readline(LONGEST_ROW + 1)
        try:
            json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):  # it goes on in the next line, or is no JSON
            is_document = True
        else:
            is_document = False
            if any(block.strip() for block in iter(partial(stream.read, CHUNK), b"")):
                return cls(False, None)
        stream.seek(start)
        text = _JsonText(stream)
        try:
            members = {name: text.is_list_of_rows() for name in text.names()}
            is_alone = not text.next_character()
        except (ValueError, RecursionError):  # JSON lines, the first of them broken
            return cls(False, None)
        arrays = [name for name, is_list in members.items() if is_list]
        if is_alone and arrays and shape_of(members) is None:
            return cls(True, arrays)
        return cls(is_document, None)


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


class _JsonText:
    """The text of a JSON file, decoded value by value: the whole of it is never held."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.decode = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.decoder = json.JSONDecoder()
        self.text, self.position, self.ended = "", 0, False

    def next_character(self, skipped: str = BLANKS) -> str:
        """Move to the next character that is none of these, and return it; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in skipped:
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._read_more()

    def value(self) -> Any:
        """Return the value that begins here, and move behind it.

        Raises: JSONDecodeError for what is no JSON; TooLong; ValueError or RecursionError for what cannot be held.
        """
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:
                    self.position = end
                    return value
            except json.JSONDecodeError:
                if self.ended:
                    raise
            if len(self.text) - self.position > LONGEST_ROW:
                raise TooLong
            self._read_more()

    def names(self) -> Iterator[str]:
        """Yield the names in an object. Move behind the value of each before the next one. Raises: as `value`."""
        self._expect("{")
        while self.next_character(BLANKS + ",") != "}":
            name = self.value()
            if not isinstance(name, str):
                raise ValueError("a name is no text")
            self._expect(":")
            self.next_character()
            yield name
        self.position += 1

    def items(self) -> Iterator[Any]:
        """Yield the items of an array. Raises: as `value`, and EOFError where it does not end."""
        self._expect("[")
        while (character := self.next_character(BLANKS + ",")) != "]":
            if not character:
                raise EOFError
            yield self.value()
        self.position += 1

    def is_list_of_rows(self) -> bool:
        """Whether the value here is an array that begins with an object which is no turn of a conversation; move behind
        it. Raises: as `value`."""
        if self.next_character() != "[":
            self.value()
            return False
        is_first, is_list = True, False
        try:
            for item in self.items():
                if is_first:
                    is_list = isinstance(item, dict) and not ({"role", "from"} & item.keys())
                is_first = False
        except EOFError:
            raise ValueError("the array does not end") from None
        return is_list

    def skip_value(self) -> None:
        self.is_list_of_rows()

    def _expect(self, character: str) -> None:
        if self.next_character() != character:
            raise ValueError(f"{character} is missing")
        self.position += 1

    def _read_more(self) -> None:
        # As much again as is waiting: an item of n bytes is tried log2(n / chunk) times.
        data = self.stream.read(max(CHUNK, len(self.text) - self.position))
        self.ended = not data
        self.text, self.position = self.text[self.position :] + self.decode(data, self.ended), 0


class TooLong(ValueError):
    """A value of more than LONGEST_ROW bytes."""


def _array_items(path: Path, text: _JsonText, name: str | None = None) -> Iterator[tuple[int, Row]]:
    """Items of the JSON array that begins here; `name`: of the array in an object."""
    array = "the JSON array" if name is None else f"the JSON array {name!r}"
    items, number = text.items(), 0
    while True:
        number += 1
        try:
            item = next(items)
        except StopIteration:
            break
        except EOFError:
            raise ConfigError(
                f"{path} ends inside of its JSON array, after {number - 1} items: the file is cut"
            ) from None
        except TooLong:
            raise ConfigError(f"{path} item {number} of {array} {TOO_LONG}, or is not valid JSON") from None
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} item {number} of {array} is not valid JSON: {error.msg}: mend or remove it"
            ) from None
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"{path} item {number} of {array} cannot be read: {error}") from None
        yield number, _row_of(item)
    if name is None and text.next_character():
        raise ConfigError(
            f"{path} goes on behind the end of its JSON array, after {number - 1} items: give one array, or one object in "
            "each line"
        )


def _objects(path: Path, text: _JsonText) -> Iterator[tuple[int, Row]]:
    """Objects one after the other, as `jq .` writes them."""
    number = 0
    while text.next_character(BLANKS + ","):
        number += 1
        try:
            yield number, _row_of(text.value())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} object {number} cannot be read as JSON: {error}") from None


def _row_of(item: Any) -> Row:
    message = f"must be a JSON object, got {type(item).__name__}"
    return item if isinstance(item, dict) else UnusableRow("an item is not a JSON object", message)


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
