"""Flows - tables of a page: rows of named values as texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Columns and cells, as texts."""

    names: list[str]
    rows: list[list[str]]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as a table: None is "unscored", a missing column is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(names, [[_cell(row.get(name, "")) for name in names] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "unscored"
    if isinstance(value, str):
        return value
    return json.dumps(value)
