"""Flows - where a history sends what it learns, beside the report: a tracker and pages, or nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from data_contracts.artifact import ArtifactRecord
from tasks.place import Place


class RunTracker(Protocol):
    """Mirrors artifacts and measurements of a run, e.g. in MLflow."""

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None: ...

    def summary(self, iteration: int, values: dict[str, float]) -> None: ...


class Pages(Protocol):
    """Shows a run while it is played, e.g. in Prefect's UI."""

    def show(self, place: Place, rows: list[dict[str, Any]], summary: str, report: Path) -> None: ...

    def info(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


class Nowhere:
    """A tracker and pages that do nothing, for a report written again: MLflow and Prefect have the run already."""

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        pass

    def summary(self, iteration: int, values: dict[str, float]) -> None:
        pass

    def show(self, place: Place, rows: list[dict[str, Any]], summary: str, report: Path) -> None:
        pass

    def info(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass
