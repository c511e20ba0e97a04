"""Flows - a run's table, summaries, report and figures in the Prefect UI. A run goes on without a server."""

from __future__ import annotations

import base64
import re
from html import unescape
from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from data_contracts.redaction import redact, redact_value
from flows.report.text import as_markdown
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
        on, so what it shows is sent as Markdown, with each figure inside its own address.
        """
        head = f"The page with all figures: `{report.with_suffix('.html')}`, on the machine of the run.\n\n"
        try:
            create_markdown_artifact(
                head + redact(report.read_text(encoding="utf-8")),
                key=f"{self.run}-report",
                description=f"Report of {self.run}",
            )
            if figures := _figures(report.with_name("plots")):
                create_markdown_artifact(figures, key=f"{self.run}-figures", description=f"Main figures of {self.run}")
        except Exception as error:
            self.warn(f"the report could not be sent to Prefect: {error}")

    def info(self, message: str) -> None:
        self.logger.info("%s", message)

    def warn(self, message: str) -> None:
        self.logger.warning("%s", message)


def _figures(directory: Path) -> str:
    """Return the figures to show, each under its caption, as Markdown."""
    parts: list[str] = []
    for name in SHOWN_FIGURES:
        path = directory / f"{name}.svg"
        if not path.is_file():
            continue
        svg = redact(path.read_text(encoding="utf-8"))
        caption = re.search(r"<title>(.*?)</title>", svg, re.DOTALL)
        parts.append(f"### {as_markdown(unescape(caption[1]) if caption else name)}")
        parts.append(f"![{name}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})")
    return "\n\n".join(parts)
