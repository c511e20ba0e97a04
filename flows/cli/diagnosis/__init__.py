"""Flows - what can be wrong here, found part by part: the environment, the store, the Prefect server."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """Something that is worth a line, and what to do about it."""

    level: Literal["ok", "note", "bad"]
    """bad: a run will fail or stand still because of it; note: it costs something, or will one day."""
    message: str
    cure: str = ""
    """A command, or the setting to change."""
