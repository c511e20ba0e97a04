"""Stages - plug-ins by name: methods, samplers, scorers, weights. A table holds `name -> "module:Attribute"`.

A module is imported when its name is chosen. Entry points have the same grammar: another package adds a name in the
group `selfplay.<family>`, without a line here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from data_contracts.config import Config
from data_contracts.errors import ConfigError


class Named(Config):
    """Settings of a plug-in that is chosen by name; each subclass pins `name` with a Literal."""

    name: str

    def identity(self) -> dict[str, Any]:
        """The settings, and the plug-in's VERSION where it is not the first one: a changed meaning is a changed key."""
        version = version_of(self)
        return super().identity() | ({"VERSION": version} if version != FIRST_VERSION else {})


FIRST_VERSION = "1"
"""Of every plug-in; not written into keys, so that artifacts made before plug-ins had versions stay found."""


class Plugin:
    """The class that a name stands for. A subclass writes `Config`, and what its family's base class says."""

    VERSION: ClassVar[str] = FIRST_VERSION
    """Raise it when the same settings give other numbers: it enters the key of every artifact that the plug-in made."""
    Config: ClassVar[type[Named]]
    """The settings, with `name` pinned to the plug-in's name."""


P = TypeVar("P", bound=Plugin)
FAMILY = "x-family"
"""Key of a JSON schema: the family of the plug-ins that a field chooses from."""


class Registry(Generic[P]):
    """The plug-ins of one family by name.

    The type of a field that holds the settings of one of them is `Annotated[Named, REGISTRY]`: the field takes a bare
    name, a mapping `{"name": ..., setting: ...}` or a plug-in's own `Config`, and holds that plug-in's own `Config`.
    """

    def __init__(self, family: str, table: dict[str, str]):
        self.family, self.table = family, table
        FAMILIES.append(self)

    def names(self) -> list[str]:
        return sorted(self.table.keys() | {point.name for point in self._entry_points()})

    def __contains__(self, name: str) -> bool:
        return name in self.table or name in self._entry_points().names

    def _entry_points(self) -> EntryPoints:
        return entry_points_of(self.family)

    def get(self, name: str) -> type[P]:
        """The plug-in called `name`.

        Raises: ConfigError for an unknown name (with the nearest known one), and for a plug-in that does not load.
        """
        target = self.table.get(name)
        for point in self._entry_points():
            if target is None and point.name == name:
                target = point.value
        if target is None:
            message = f"unknown {self.family.removesuffix('s')} {name!r}; known: {', '.join(self.names())}."
            if close := difflib.get_close_matches(name, self.names(), 1):
                message += f" Did you mean {close[0]!r}?"
            raise ConfigError(message)
        module, _, attribute = target.partition(":")
        try:
            plugin = getattr(importlib.import_module(module), attribute)
        # Code of another package may fail in any way; whatever happens must not look like an unknown name.
        except Exception as error:
            raise ConfigError(
                f"{self.family} {name!r} is registered as {target!r}, which does not load: "
                f"{type(error).__name__}: {error}. See where: python -c 'import {module}'"
            ) from error
        if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
            raise ConfigError(f"{self.family} {name!r} ({target}) is not derived from the base class of {self.family}")
        if not issubclass(getattr(plugin, "Config", object), Named):
            raise ConfigError(
                f"{self.family} {name!r} ({target}) has no class `Config` derived from stages.registry.Named"
            )
        return cast("type[P]", plugin)

    def config(self, value: Any) -> Named:
        """The settings that `{"name": ..., setting: ...}` or a bare name stands for, as the plug-in's own `Config`."""
        if isinstance(value, Named):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f'must be a mapping with a "name" (one of {", ".join(self.names())})')
        return self.get(value["name"]).Config.model_validate(value)

    def settings_class(self, value: Any) -> type[Named] | None:
        """The class of the settings that a value names; None if it names no plug-in that loads."""
        name = value.get("name") if isinstance(value, dict) else value
        if not isinstance(name, str) or name not in self:
            return None
        try:
            return self.get(name).Config
        except ConfigError:
            return None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Serialized as any: by the plug-in's own class, not as a bare Named.
        return core_schema.no_info_before_validator_function(
            self.config, handler(source), serialization=core_schema.simple_ser_schema("any")
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "type": "object",
            "title": self.family,
            # The options belong to each plug-in and are validated by its own class; flows/form.py spells them out.
            FAMILY: self.family,
            "properties": {"name": {"type": "string", "enum": self.names()}},
            "required": ["name"],
            "additionalProperties": True,
        }


def entry_points_of(family: str) -> EntryPoints:
    """The entry points of all installed packages in the group `selfplay.<family>`.

    Reading them opens a file of every installed package, 20 ms, and a run config asks hundreds of times; so they are
    read again only after the import path, or a directory on it, has changed.
    """
    groups = _entry_points_on(tuple((path, _changed_at(path)) for path in sys.path))
    return groups.get(f"selfplay.{family}", EntryPoints())


@lru_cache(maxsize=4)
def _entry_points_on(search_path: tuple[tuple[str, int], ...]) -> dict[str, EntryPoints]:
    """Return the entry points by group, those of this project's groups alone."""
    points = entry_points()
    return {group: points.select(group=group) for group in points.groups if group.startswith("selfplay.")}


def _changed_at(directory: str) -> int:
    try:
        return os.stat(directory or ".").st_mtime_ns
    except OSError:
        return 0


FAMILIES: list[Registry[Any]] = []
"""Every registry of this process."""


def version_of(config: Named) -> str:
    """VERSION of the plug-in that these are the settings of; FIRST_VERSION for settings of no registered plug-in."""
    for registry in FAMILIES:
        if config.name in registry:
            plugin = registry.get(config.name)
            if plugin.Config is type(config):
                return getattr(plugin, "VERSION", FIRST_VERSION)
    return FIRST_VERSION
