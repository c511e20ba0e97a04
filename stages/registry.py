"""Stages - tables of names: method, sampler, scorer, weights. `name -> "module:Attribute"`, resolved when chosen.

The same grammar is the entry-point grammar: an outside package adds a name under the group `selfplay.<family>` without touching a line here.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from data_contracts.config import Config
from data_contracts.errors import ConfigError


class Named(Config):
    """Settings of something chosen by name; each subclass pins `name` with a Literal."""

    name: str


class Registry:
    """One family of plug-ins. Every attribute it resolves to has a `Config` class (a `Named`) with its settings."""

    def __init__(self, family: str, table: dict[str, str]):
        self.family, self.table = family, table

    def names(self) -> list[str]:
        return sorted(self.table.keys() | {point.name for point in self._outside()})

    def _outside(self):
        return entry_points(group=f"selfplay.{self.family}")

    def get(self, name: str) -> Any:
        """Raises: ConfigError for an unknown name (with the nearest known one) or a plug-in that does not load."""
        target = self.table.get(name) or next((point.value for point in self._outside() if point.name == name), None)
        if target is None:
            close = difflib.get_close_matches(name, self.names(), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown {self.family} {name!r}; known: {', '.join(self.names())}.{hint}")
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            # A plug-in that fails to load must not look like an unknown name.
            raise ConfigError(
                f"{self.family} {name!r} is registered as {target!r}, which does not load: {error}"
            ) from error

    def config(self, value: Any) -> Any:
        """Turn `{"name": ..., ...}` (or a bare name) into that plug-in's own config."""
        if isinstance(value, Config):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f'must be a mapping with a "name" (one of {", ".join(self.names())})')
        return self.get(value["name"]).Config.model_validate(value)

    def field(self) -> Any:
        """The pydantic type of a field that holds one plug-in's settings."""
        schema = {
            "type": "object",
            "title": self.family,
            "properties": {"name": {"type": "string", "description": f"one of: {', '.join(self.names())}"}},
            "required": ["name"],
            # Prefect enforces this schema; the options belong to each plug-in and are validated by its own class.
            "additionalProperties": True,
        }
        return Annotated[SerializeAsAny[Named], BeforeValidator(self.config), WithJsonSchema(schema)]
