"""Flows - a run's table, summaries, report and figures in the Prefect UI. A run goes on without a server."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from data_contracts.redaction import redact, redact_value
from tasks.place import Place

SHOWN_FIGURES = (
    "score",
    "gain",
    "win-rates",
    "tournament",
    "loss",
    "accuracy",
    "margins",
    "logps",
    "lengths",
    "fluency",
    "dropped",
)
"""Figures of the report that the UI shows too, in this order, where the run has them."""


class PrefectPages:
    """Artifacts of one run in the Prefect UI, inside a flow run."""

    def __init__(self, run: str, logger: Logger | LoggerAdapter[Any]):
        """`logger`: that of the flow run."""
        self.run, self.logger = run, logger

    def show(self, place: Place, rows: list[dict[str, Any]], summary: str, report: Path) -> None:
        """Update the run's table, and add a summary of this iteration."""
        iteration = place.step.replace("_", "-")
        try:
            create_table_artifact(
                redact_value(rows), key=f"{self.run}-history", description=f"{self.run}, iteration by iteration"
            )
            create_markdown_artifact(redact(f"{summary}\n\nReport: `{report}`"), key=f"{self.run}-{iteration}")
        except Exception as error:
            self.warn(f"the tables could not be sent to Prefect: {error}")

    def finish(self, report: Path) -> None:
        """Show the whole report and its main figures, at the end of the run.

        report: report.md, with report.html and plots/ beside it. A browser opens no file of the machine that the run was
        on, so what it shows is sent: text as Markdown, each figure as an image in its own address.
        """
        head = f"The page with all figures: `{report.with_suffix('.html')}`, on the machine of the run.\n\n"
        try:
            create_markdown_artifact(
                head + redact(report.read_text(encoding="utf-8")),
                key=f"{self.run}-report",
                description=f"Report of {self.run}",
            )
            for name, path in _figures(report.with_name("plots")):
                address = f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
                create_image_artifact(address, key=f"{self.run}-figure-{name}", description=f"{self.run}: {name}")
        except Exception as error:
            self.warn(f"the report could not be sent to Prefect: {error}")

    def info(self, message: str) -> None:
        self.logger.info("%s", message)

    def warn(self, message: str) -> None:
        self.logger.warning("%s", message)


def _figures(directory: Path) -> Iterable[tuple[str, Path]]:
    """The name and the file of each figure to show."""
    paths = ((name, directory / f"{name}.svg") for name in SHOWN_FIGURES)
    return ((name, path) for name, path in paths if path.is_file())
