"""Tasks - mirror a run into MLflow: a parent run per flow run, a child run per iteration.

The records in the store are the truth; this is a copy for plots and comparisons. An MLflow that is away, slow or broken
costs one log line.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import flatten
from data_contracts.files import process_state
from data_contracts.redaction import redact
from data_contracts.store import Store
from tasks.trackers import Described, curve_points, mlflow_database, mlflow_uri, moment_of, stage_values

PATIENCE = {  # a server that does not answer would hold each call for four minutes otherwise
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PATH_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database that hold URIs of files."""
HOST, PID = "selfplay.host", "selfplay.pid"
"""Tags of a parent run: the process that mirrors it."""
SETTINGS = "selfplay.settings"
"""Tag of a parent run: the digest of the settings, by which a repeated run is found."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Tag of the experiment by which MLflow's UI knows that it holds training runs."""
TRAINING_PAGE = "workflowType=machine_learning"
"""What MLflow 3.17's UI opens training runs by, whatever the tag says; without it, a page of traces that are not there."""
BATCH = 900
"""Metrics of one call; MLflow takes 1000."""


def import_client() -> Any:
    """MLflow's client class. Two seconds the first time: a run imports it while its Prefect server starts."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient


class Tracker:
    """One run's mirror. Best effort: after the first failure it logs one line and does nothing more.

    A run with the same settings goes on in the same MLflow run. Points bear their artifact's time: sent twice, one stays.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        log: Callable[[str], None],
        uri: str | None = None,
        described: Described | None = None,
    ):
        """described: without it, each session has a run of its own, without parameters, tags and data."""
        self.store, self.run, self.log, self.working = store, run, log, True
        self.uri = uri or mlflow_uri(store)
        self.client: Any = None
        self.parent = ""
        self.children: dict[int, str] = {}
        self.sent: dict[tuple[int, str], str] = {}
        """Iteration and stage -> digest of the artifact that MLflow has."""
        self.whole: set[str] = set()
        """Children that had ended before, to which nothing was added."""
        self.steps = 0
        """Optimizer steps of the iterations before."""
        self.moment = time.time()
        """When the last artifact was finished."""
        self.ended: int | None = None
        """When the run that goes on had ended, in ms; None once something is new."""
        self._try(self._open, run, described)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if not self.working:
            return
        try:
            action(*arguments)
        except Exception as error:  # MLflow raises whatever its transport raises; none of it may end a run
            self.working = False
            message = redact(str(error).partition("\n")[0])
            self.log(
                f"MLflow at {redact(self.uri)} does not work ({type(error).__name__}: {message:.200}): "
                "this run is not mirrored there; nothing else is lost"
            )

    def _open(self, run: str, described: Described | None) -> None:
        mlflow_client = import_client()
        with self.store.lock_apart("mlflow"):  # two processes that make the sqlite schema at once break each other
            self.client = mlflow_client(tracking_uri=self.uri, registry_uri=self.uri)
            experiment = self.client.get_experiment_by_name("self-play")
            if experiment is not None:
                self.experiment = experiment.experiment_id
                self._follow_the_store(experiment.artifact_location)
            else:
                location = None
                if self.uri.startswith("sqlite"):
                    location = (self.store.root / "mlflow-artifacts").as_uri()
                self.experiment = self.client.create_experiment("self-play", artifact_location=location, tags=KIND)
        if experiment is not None and not KIND.items() <= experiment.tags.items():
            for name, value in KIND.items():
                self.client.set_experiment_tag(self.experiment, name, value)
        self._end_dead_sessions(run)
        tags = {HOST: os.uname().nodename, PID: str(os.getpid())}
        if described is not None:
            tags |= {SETTINGS: described.digest, "mlflow.note.content": described.note, **described.tags}
            tags |= {"mlflow.source.name": "selfplay", "mlflow.source.type": "LOCAL"}
            if commit := described.tags.get("commit"):
                tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
            tags = {name: redact(value)[:5000] for name, value in tags.items()}
            if self._go_on(run, described.digest, tags):
                return
        self.parent = self.client.create_run(self.experiment, run_name=run, tags=tags).info.run_id
        if described is not None:
            self._describe(described)

    def _go_on(self, run: str, settings: str, tags: Mapping[str, str]) -> bool:
        """Take up the newest MLflow run of the same name and settings that has ended. Returns whether there is one."""
        search = self.client.search_runs
        ended = f"attributes.run_name = '{run}' and attributes.status != 'RUNNING' and tags.`{SETTINGS}` = '{settings}'"
        runs = search([self.experiment], ended, max_results=1, order_by=["attributes.start_time DESC"])
        if not runs:
            return False
        self.parent, self.ended = runs[0].info.run_id, runs[0].info.end_time
        for child in search([self.experiment], f"tags.`mlflow.parentRunId` = '{self.parent}'"):
            iteration = int(child.data.tags["iteration"])
            self.children[iteration] = child.info.run_id
            if child.info.status == "FINISHED":
                self.whole.add(child.info.run_id)
            for name, value in child.data.tags.items():
                if name.startswith("digest."):
                    self.sent[iteration, name.removeprefix("digest.")] = value
        for name, value in tags.items():
            if runs[0].data.tags.get(name) != value:
                self.client.set_tag(self.parent, name, value)
        self.client.update_run(self.parent, "RUNNING")
        return True

    def _describe(self, described: Described) -> None:
        """Log the settings as parameters, nested sections by dotted names, and the prompts as data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        by_name = {_valid(name): value for name, value in flatten(described.settings).items()}
        params = [_param(name, value) for name, value in by_name.items()]
        self.client.log_batch(self.parent, params=params)
        inputs = [
            DatasetInput(
                Dataset(
                    name=data.name[:500],
                    digest=data.digest[:36],
                    source_type="selfplay",
                    source=json.dumps({"path": redact(data.source)}),
                    profile=json.dumps({"rows": data.rows}),
                ),
                [InputTag("mlflow.data.context", data.context)],
            )
            for data in described.data
        ]
        if inputs:
            self.client.log_inputs(self.parent, inputs)

    def _follow_the_store(self, location: str) -> None:
        """Have a database that moved with its store name the directories of the store where that lies now.

        MLflow keeps absolute paths and has no call that changes them: reports would go where the store was.
        location: where the artifacts of the experiment are, as the database says
        """
        root, artifacts = self.store.root.as_uri(), "/mlflow-artifacts"
        earlier = location.removesuffix(artifacts)
        path = mlflow_database(self.store)
        if self.uri != f"sqlite:///{path}" or earlier in (root, location):
            return
        with closing(sqlite3.connect(path)) as database, database:
            for table, column in PATH_COLUMNS:
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                    (root, len(earlier) + 1, len(earlier) + 1, f"{earlier}/"),
                )

    def _end_dead_sessions(self, run: str) -> None:
        """Mark the runs of sessions that were killed on this machine as KILLED: MLflow would show them as running."""
        running = "attributes.status = 'RUNNING' and "
        search = self.client.search_runs
        here = f"tags.`{HOST}` = '{os.uname().nodename}'"
        for session in search([self.experiment], f"{running} attributes.run_name = '{run}' and {here}"):
            if process_state(int(session.data.tags[PID])):
                continue
            parent = session.info.run_id
            children = search([self.experiment], f"{running} tags.`mlflow.parentRunId` = '{parent}'")
            for dead in (*children, session):
                self.client.set_terminated(dead.info.run_id, "KILLED")

    def where(self) -> str:
        """Return where to look at the run, for the log; "" if it is not mirrored."""
        if not self.working:
            return ""
        page = f"/#/experiments/{self.experiment}/runs/{self.parent}?{TRAINING_PAGE}"
        if self.uri.startswith("http"):
            return redact(self.uri).rstrip("/") + page
        return f"`mlflow ui --backend-store-uri {redact(self.uri)}`, then http://127.0.0.1:5000{page}"

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        """Metrics, seconds, costs and digest of one artifact, into the iteration's child run; a training's curve too.

        stage_name: the name under which the run shows the artifact.
        """
        self._try(self._stage, iteration, record, cached, stage_name)

    def _stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        self.moment = moment_of(record)
        points = curve_points(self.store.directory(record.kind, record.key))
        first = self.steps
        if stage_name == "train":
            self.steps += max((step for step, _ in points), default=0)
        if self.sent.get((iteration, stage_name)) == record.content:
            return
        child, self.ended = self._child(iteration), None
        self.whole.discard(child)
        values = stage_values(record, cached, stage_name)
        self._log(child, [self._metric(name, value) for name, value in values.items()])
        self._log(child, [self._metric(name, value, step) for step, row in points for name, value in row.items()])
        if stage_name == "train":
            over_run = [(first + step, row) for step, row in points]
            self._log(
                self.parent, [self._metric(name, value, step) for step, row in over_run for name, value in row.items()]
            )
            if hardware := record.provenance.get("hardware"):
                self.client.set_tag(self.parent, "hardware", str(hardware))
        # Last: what bears its digest is whole.
        self.client.set_tag(child, f"artifact.{stage_name}", f"{record.kind}/{record.key}")
        self.client.set_tag(child, f"digest.{stage_name}", record.content)
        self.sent[iteration, stage_name] = record.content

    def _log(self, run: str, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run, metrics=metrics[start : start + BATCH])

    def _metric(self, name: str, value: float, step: int = 0) -> Any:
        from mlflow.entities import Metric

        return Metric(_valid(name), float(value), int(self.moment * 1000), step)

    def _child(self, iteration: int) -> str:
        """The MLflow id of the iteration's run, made at its first use."""
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
        self._try(self._summary, iteration, values)

    def _summary(self, iteration: int, values: dict[str, float]) -> None:
        self._log(self.parent, [self._metric(name, value, iteration) for name, value in values.items()])

    def register(self, policies: Mapping[str, ArtifactRef]) -> None:
        """Set the aliases of the registered model that has the run's name.

        policies: alias -> checkpoint. Each content becomes one version, however often the run is repeated.
        """
        self._try(self._register, policies)

    def _register(self, policies: Mapping[str, ArtifactRef]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        registered = self.client.search_model_versions(f"name='{self.run}'")
        versions = {version.tags.get("digest"): version.version for version in registered}
        for alias, ref in policies.items():
            if ref.content not in versions:
                versions[ref.content] = self._new_version(ref)
            self.client.set_registered_model_alias(self.run, alias, versions[ref.content])

    def _new_version(self, ref: ArtifactRef) -> str:
        """Register a checkpoint; returns its version. Nothing is copied: the source is the checkpoint's directory.

        A server takes no path of this machine; there the path is a tag, and the source is the run.
        """
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
        """Upload the report and its plots, if there is one, and end all runs of this mirror."""
        self._try(self._finish, report, status)

    def _finish(self, report: Path | None, status: str) -> None:
        if report is not None:
            others = [report.with_suffix(".html"), report.with_name("gate.json"), report.with_name("tournament.json")]
            for path in (report, *others):
                if path.is_file():
                    self.client.log_artifact(self.parent, str(path))
            if (plots := report.with_name("plots")).is_dir():
                self.client.log_artifacts(self.parent, str(plots), "plots")
        for child in self.children.values():
            if child not in self.whole:
                self.client.set_terminated(child, status)
        self.client.set_terminated(self.parent, status, self.ended)


def _valid(name: str) -> str:
    """Return a name that MLflow takes: word characters, `-. /:`, and no path that is not in its shortest form.

    >>> _valid("models.a@b(c)"), _valid("/spoilt//a?")
    ('models.a_b_c_', 'spoilt/a_')
    """
    return posixpath.normpath(re.sub(r"[^\w\-. /:]", "_", name)).lstrip("/.")[:250]


def _param(name: str, value: Any) -> Any:
    from mlflow.entities import Param

    return Param(name, redact(str(value))[:500])
