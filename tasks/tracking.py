"""Tasks - mirror a run into MLflow: parent run per flow run, child run per iteration.

The records in the store are the truth; this is a copy for plots and comparisons. MLflow being away, slow or broken costs one log line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import flatten
from data_contracts.store import Store

# A server that does not answer would hold each call for four minutes otherwise.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def import_client() -> Any:
    """MLflow's client class. Two seconds the first time: a run imports it while its Prefect server starts."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient


class Tracker:
    """Best effort. After the first failure it says so and does nothing more."""

    def __init__(self, store: Store, run: str, log: Callable[[str], None], uri: str | None = None):
        self.store, self.run, self.log, self.working = store, run, log, True
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root}/mlflow.db"
        self.client: Any = None
        self.parent = ""
        self.children: dict[int, str] = {}
        self._try(self._open, run)

    def _try(self, do: Callable[..., None], *arguments: Any) -> None:
        if not self.working:
            return
        try:
            do(*arguments)
        except Exception as error:  # MLflow raises whatever its transport raises; none of it may end a run
            self.working = False
            said = without_password(str(error).partition("\n")[0])
            self.log(
                f"MLflow at {without_password(self.uri)} does not work ({type(error).__name__}: {said:.200}): this run is not mirrored there; nothing else is lost"
            )

    def _open(self, run: str) -> None:
        mlflow_client = import_client()
        # Two processes that make the sqlite schema at once break each other.
        with self.store.lock_apart("mlflow"):
            self.client = mlflow_client(tracking_uri=self.uri, registry_uri=self.uri)
            experiment = self.client.get_experiment_by_name("self-play")
            if experiment is None:
                location = (self.store.root / "mlflow-artifacts").as_uri() if self.uri.startswith("sqlite") else None
                identity = self.client.create_experiment("self-play", artifact_location=location)
            else:
                identity = experiment.experiment_id
        self.experiment = identity
        self.parent = self.client.create_run(identity, run_name=run).info.run_id

    def parameters(self, values: dict[str, Any]) -> None:
        self._try(
            lambda: self.client.log_batch(
                self.parent, params=[_param(name, value) for name, value in flatten(values).items()]
            )
        )

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, shown_as: str) -> None:
        """Metrics, seconds and digest of one artifact, into the iteration's child run; a training's curve too."""
        self._try(self._stage, iteration, record, cached, shown_as)

    def _stage(self, iteration: int, record: ArtifactRecord, cached: bool, shown_as: str) -> None:
        child = self._child(iteration)
        metrics = [_metric(f"{shown_as}/{name}", value) for name, value in record.metrics.items()]
        metrics += [_metric(f"{shown_as}/seconds/{name}", value) for name, value in record.seconds.items()]
        metrics += [_metric(f"{shown_as}/cost/{name}", value) for name, value in record.cost.items()]
        metrics += [_metric(f"{shown_as}/cached", float(cached))]
        curve = self.store.directory(record.kind, record.key) / "metrics.jsonl"
        for line in curve.read_text().splitlines() if curve.is_file() else []:
            values = json.loads(line)
            metrics += [
                _metric(f"curve/{name}", value, int(values["step"])) for name, value in values.items() if name != "step"
            ]
        tags = {f"artifact.{shown_as}": f"{record.kind}/{record.key}", f"digest.{shown_as}": record.content}
        for start in range(0, len(metrics), 900):  # MLflow takes 1000 in one call
            self.client.log_batch(child, metrics=metrics[start : start + 900])
        for name, value in tags.items():
            self.client.set_tag(child, name, value)

    def _child(self, iteration: int) -> str:
        if iteration not in self.children:
            run = self.client.create_run(
                self.experiment,
                run_name=f"iter_{iteration:02d}",
                tags={"mlflow.parentRunId": self.parent, "iteration": str(iteration)},
            )
            self.children[iteration] = run.info.run_id
        return self.children[iteration]

    def summary(self, iteration: int, values: dict[str, float]) -> None:
        """Headline numbers in the parent run, with the iteration as step: one curve per run."""
        self._try(
            lambda: self.client.log_batch(
                self.parent, metrics=[_metric(name, value, iteration) for name, value in values.items()]
            )
        )

    def register(self, policies: Mapping[str, ArtifactRef]) -> None:
        """Alias -> checkpoint: versions of the registered model that has the run's name, one per content, however often the run is repeated."""
        self._try(self._register, policies)

    def _register(self, policies: Mapping[str, ArtifactRef]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = {
            one.tags.get("digest"): one.version for one in self.client.search_model_versions(f"name='{self.run}'")
        }
        for alias, ref in policies.items():
            if ref.content not in versions:
                versions[ref.content] = self._new_version(ref)
            self.client.set_registered_model_alias(self.run, alias, versions[ref.content])

    def _new_version(self, ref: ArtifactRef) -> str:
        """The checkpoint where it lies, nothing is copied. A server takes no path of this machine: there it is a tag, and the source is the run."""
        from mlflow.exceptions import MlflowException

        tags = {"artifact": f"{ref.kind}/{ref.key}", "digest": ref.content, "path": ref.path}
        try:
            source = Path(ref.path).absolute().as_uri()
            return self.client.create_model_version(self.run, source=source, run_id=self.parent, tags=tags).version
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
        source = self.client.get_run(self.parent).info.artifact_uri
        return self.client.create_model_version(self.run, source=source, run_id=self.parent, tags=tags).version

    def finish(self, report: Path | None, status: str = "FINISHED") -> None:
        self._try(self._finish, report, status)

    def _finish(self, report: Path | None, status: str) -> None:
        if report is not None:
            for path in (
                report,
                report.with_suffix(".html"),
                report.with_name("gate.json"),
                report.with_name("tournament.json"),
            ):
                if path.is_file():
                    self.client.log_artifact(self.parent, str(path))
            if (plots := report.with_name("plots")).is_dir():
                self.client.log_artifacts(self.parent, str(plots), "plots")
        for run in [*self.children.values(), self.parent]:
            self.client.set_terminated(run, status)


def without_password(text: str) -> str:
    """user:password@ in an address, as user:***@."""
    return re.sub(r"(?<=://)([^/@\s:]*):[^/@\s]*@", r"\1:***@", text)


def _metric(name: str, value: float, step: int = 0) -> Any:
    from mlflow.entities import Metric

    return Metric(re.sub(r"[^\w\-. /:]", "_", name), float(value), int(time.time() * 1000), step)


def _param(name: str, value: Any) -> Any:
    from mlflow.entities import Param

    return Param(name, str(value)[:500])
