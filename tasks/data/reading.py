"""Tasks - source -> prompts: every row that can be used, and what there is to say of the others.

Rows pass by one at a time and are kept as columns. A source with rows that cannot be used is read to its end, so that
all is said at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow, UnusableRow
from tasks.data.collector import Collector, with_unique_ids
from tasks.data.drops import REPETITION, Drops
from tasks.data.files import RawFile, open_source
from tasks.data.prompt_set import PromptSet, place_of
from tasks.data.selection import has_single_answers, mixed
from tasks.data.shapes import LABELS, Shape, columns_read, read_row, shape_of
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
    """Every usable row of a source, in its order; with a `limit`, so many of them, drawn by `seed`.

    Raises: ConfigError for a source that cannot be read, has no prompts or mixes shapes; TransientError for a hub that
    does not answer.
    """
    if source.mix:
        return _read_mix(source, seed)
    return _read_files(source, seed)


def _read_mix(source: Source, seed: int) -> Reading:
    parts = [read_source(share.source, seed) for share in source.mix]
    weights = [share.weight for share in source.mix]
    prompts = PromptSet.joined(mixed([part.prompts for part in parts], weights, source.limit, seed))
    if not prompts:
        raise ConfigError(f"{source}: no row is left of the mix; raise its limit or the weight of its smallest source")
    prompts, notes = with_unique_ids(prompts, of_one_source=False)
    drops = Drops()
    used: dict[str, None] = {}
    ignored: dict[str, None] = {}
    for share, part in zip(source.mix, parts, strict=True):
        drops.update(part.drops)
        notes += [f"{share.source}: {note}" for note in part.notes]
        used |= dict.fromkeys(part.used)
        ignored |= dict.fromkeys(part.ignored)
    rows = sum(part.rows for part in parts)
    shapes = ", ".join(dict.fromkeys(part.shape for part in parts))
    return Reading(prompts, rows, drops, notes, shapes, list(used), [name for name in ignored if name not in used])


def _read_files(source: Source, seed: int) -> Reading:
    files, notes = open_source(source)
    reader = _Reader(source, files)
    collector = Collector(source.limit, seed)
    for number, file in enumerate(files):
        for place, row in reader.rows(number, file):
            collector.add(row, number, place)
    reader.check()
    prompts, repetitions = collector.finish([file.name for file in files], files[0].unit)
    for place, earlier in repetitions:
        reader.drops.add(REPETITION, place, f"{place} repeats {earlier}")
    prompts, more_notes = with_unique_ids(prompts)
    used = list(reader.used)
    if not has_single_answers(prompts):  # then what is called a label was none
        used = [name for name in used if reader.renamed.get(name, name) not in LABELS]
    ignored = [name for name in reader.names if name not in used]
    notes += [*more_notes, *_notes_on(ignored)]
    shape = "" if reader.shape is None else reader.shape.name
    return Reading(prompts, reader.count, reader.drops, notes, shape, used, ignored)


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
                where = f"{Path(file.name).name} {file.unit} {place}"
                sentence = f"{where} {error}"
                if not isinstance(row, UnusableRow):
                    sentence = f"{where}: {error} ({_beginning(row)})"
                self.drops.add(error.reason, self._place(number, place), sentence)
            else:
                yield place, prompt

    def _place(self, file: int, number: int) -> str:
        return place_of([file.name for file in self.files], self.files[file].unit, file, number)

    def _row(self, row: dict[str, object], file: int, number: int) -> PromptRow:
        shape = self._shape_of(tuple(row), file, number)
        if shape is None:
            raise UnusableRow("no column holds a prompt")
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


def _beginning(row: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value!r:.40}" for name, value in row.items())
