"""Stages - functions by name: a table with one line per entry, which other packages extend by entry points."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from data_contracts.errors import ConfigError
from stages.registry import entry_points_of

T = TypeVar("T")


class Table(Generic[T]):
    """Entries of one kind by name. Other packages add entries by entry points in the group `selfplay.<family>`.

    The type of a setting that names an entry is `Annotated[str, TABLE]`.
    """

    def __init__(self, family: str, kind: type[T], entries: dict[str, T]):
        self.family, self.kind, self.entries = family, kind, entries

    def names(self) -> list[str]:
        """Every name: those of this package in their order, then those of other packages."""
        return list(dict.fromkeys([*self.entries, *sorted(entry_points_of(self.family).names)]))

    def get(self, name: str) -> T:
        """Return an entry. Raises: ConfigError for an unknown name or an entry point that does not load."""
        if name in self.entries:
            return self.entries[name]
        for point in entry_points_of(self.family):
            if point.name == name:
                return self._load(point)
        message = f"unknown {self.family.removesuffix('s')} {name!r}; known: {', '.join(self.names())}."
        if close := difflib.get_close_matches(name, self.names(), 1):
            message += f" Did you mean {close[0]!r}?"
        raise ConfigError(message)

    def _load(self, point: EntryPoint) -> T:
        try:
            entry = point.load()
        except Exception as error:  # code of another package may fail in any way
            raise ConfigError(
                f"{self.family} {point.name!r} is registered as {point.value!r}, which does not load: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(entry, self.kind):
            raise ConfigError(f"{self.family} {point.name!r} ({point.value}) is no {self.kind.__name__}")
        return entry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        self.get(name)
        return name

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "enum": self.names()}
