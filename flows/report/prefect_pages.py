"""Flows - a run's table, summaries and link to its report in the Prefect UI. A run goes on without a server."""

from __future__ import annotations

from logging import Logger, LoggerAdapter
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from data_contracts.redaction import redact, redact_value
from tasks.place import Place


class PrefectPages:
    """Artifacts of one run in the Prefect UI, inside a flow run."""

    def __init__(self, run: str, logger: Logger | LoggerAdapter[Any]):
        """`logger`: that of the flow run."""
        self.run, self.logger = run, logger

    def show(self, place: Place, rows: list[dict[str, Any]], summary: str, report: Path) -> None:
        """Update the run's table and its link, and add a summary of this iteration."""
        iteration = place.step.replace("_", "-")
        try:
            create_table_artifact(
                redact_value(rows), key=f"{self.run}-history", description=f"{self.run}, iteration by iteration"
            )
            create_markdown_artifact(redact(f"{summary}\n\nReport: `{report}`"), key=f"{self.run}-{iteration}")
            create_link_artifact(report.as_uri(), link_text=f"Report of {self.run}", key=f"{self.run}-report")
        except Exception as error:
            self.warn(f"the tables could not be sent to Prefect: {error}")

    def info(self, message: str) -> None:
        self.logger.info("%s", message)

    def warn(self, message: str) -> None:
        self.logger.warning("%s", message)
