"""Tasks - copies of a run in other trackers than MLflow: Weights & Biases, TensorBoard, Trackio.

All of them take numbers by step through one small interface (`Writer`). Like MLflow's, the copy never fails a run: after
the first failure it logs one line and does nothing more. What was sent is remembered beside the run, so a run whose
artifacts are all found sends nothing again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import Runtime
from data_contracts.errors import ConfigError
from data_contracts.identity import canonical_json, digest_text
from data_contracts.redaction import redact
from data_contracts.store import Store

Axis = Literal["iteration", "step"]
"""What a number is drawn over: rounds of self-play, or optimizer steps of the whole run."""


class WandbConfig(Runtime):
    """Weights & Biases. Its key is in the environment (WANDB_API_KEY) or in ~/.netrc, never here."""

    project: str = "self-play"
    entity: str | None = None
    """Team or user. None: the account's default."""
    mode: Literal["online", "offline"] | None = None
    """offline: write below the run's directory, for `wandb sync` later. None: WANDB_MODE, else online."""


class TensorBoardConfig(Runtime):
    """Event files for `tensorboard --logdir`."""

    directory: str | None = None
    """Where a directory per run is made. None: `tensorboard` in the store."""


class TrackioConfig(Runtime):
    """Trackio: a database on this machine, or a Space of the Hugging Face hub."""

    project: str = "self-play"
    space_id: str | None = None
    """`owner/name` of a Space. None: this machine."""


class TrackingConfig(Runtime):
    """Trackers beside MLflow, e.g. `tracking: {tensorboard: {}}`. Each is an optional extra of the same name."""

    wandb: WandbConfig | None = None
    tensorboard: TensorBoardConfig | None = None
    trackio: TrackioConfig | None = None

    def chosen(self) -> dict[str, Runtime]:
        """Name -> settings of the trackers that are asked for."""
        return {name: settings for name, settings in self if settings is not None}

    def check(self) -> None:
        """Raises: ConfigError if the package of a tracker is not installed."""
        for name in self.chosen():
            if find_spec(name) is None:
                raise ConfigError(
                    f"tracking.{name} needs the package {name}, which is not installed: `pip install {name}`, or "
                    f"remove tracking.{name}"
                )


def mlflow_database(store: Store) -> Path:
    """Return the file of a store's own MLflow, which is used where no other is named."""
    return store.root / "mlflow.db"


def mlflow_uri(store: Store) -> str:
    """Return the address of the MLflow that runs of a store are mirrored to: MLFLOW_TRACKING_URI, or the store's own."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{mlflow_database(store)}"


class Data(NamedTuple):
    """A set of prompts, as trackers show it."""

    context: Literal["training", "heldout"]
    name: str
    digest: str
    source: str
    rows: int


class Described(NamedTuple):
    """What a tracker shows of a run beside its numbers."""

    settings: Mapping[str, Any]
    """Nested, as JSON."""
    tags: Mapping[str, str]
    note: str
    """Markdown."""
    data: tuple[Data, ...] = ()

    @property
    def digest(self) -> str:
        """Names the settings without those that change no artifact: a run on other nodes is the same run."""
        settings = {key: value for key, value in self.settings.items() if key not in ("execution", "tracking")}
        return digest_text(canonical_json(settings))[:16]


class Writer(Protocol):
    """One open run in a tracker."""

    def write(self, values: Mapping[str, float], axis: Axis, step: int, seconds: float) -> None:
        """Add a point to each curve. `seconds`: the time of it, since the epoch."""
        ...

    def flush(self) -> None:
        """Hand on what was written."""
        ...

    def close(self, status: str) -> None: ...


def stage_values(record: ArtifactRecord, cached: bool, stage_name: str) -> dict[str, float]:
    """Return the numbers of an artifact's record: metrics, seconds, costs, and whether it was found."""
    values = {f"{stage_name}/{name}": value for name, value in record.metrics.items()}
    values |= {f"{stage_name}/seconds/{name}": value for name, value in record.seconds.items()}
    values |= {f"{stage_name}/cost/{name}": value for name, value in record.cost.items()}
    return values | {f"{stage_name}/cached": float(cached)}


def curve_points(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the optimizer steps of a training with the numbers of each; [] for a stage that writes no such file."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    points: list[tuple[int, dict[str, float]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = int(values.pop("step"))
        points.append((step, {f"curve/{name}": value for name, value in values.items()}))
    return points


def moment_of(record: ArtifactRecord) -> float:
    """Return when an artifact was finished, in seconds since the epoch; now if its record does not say."""
    with suppress(ValueError):
        return datetime.strptime(str(record.provenance.get("time", "")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return time.time()


class Mirror:
    """One run's copy in one tracker, written as the run goes on."""

    def __init__(
        self,
        name: str,
        store: Store,
        run: str,
        described: Described,
        log: Callable[[str], None],
        opened: Callable[[], Writer],
    ):
        """`opened` opens the run in the tracker; it is called when there is something to write."""
        self.name, self.store, self.log, self.opened = name, store, log, opened
        self.working, self.writer = True, None
        self.memory = store.run_directory(run) / "tracking" / f"{name}-{described.digest}.txt"
        """A line for each thing that was sent."""
        self.sent: set[str] = set()
        with suppress(OSError, ValueError):
            self.sent = set(self.memory.read_text(encoding="utf-8").splitlines())
        self.steps = 0
        """Optimizer steps of the iterations before."""
        self.moment = time.time()

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        """The numbers of one artifact over the iteration, and a training's steps over those of the whole run."""
        self._try(self._stage, iteration, record, cached, stage_name)

    def _stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        self.moment = moment_of(record)
        points = curve_points(self.store.directory(record.kind, record.key)) if stage_name == "train" else []
        first, self.steps = self.steps, self.steps + max((step for step, _ in points), default=0)
        question = f"{iteration}/{stage_name}/{record.content}"
        if question in self.sent:
            return
        self._write(stage_values(record, cached, stage_name), "iteration", iteration)
        for step, values in points:
            self._write(values, "step", first + step)
        self._remember(question)

    def summary(self, iteration: int, values: Mapping[str, float]) -> None:
        """Headline numbers over the iteration."""
        self._try(self._summary, iteration, values)

    def _summary(self, iteration: int, values: Mapping[str, float]) -> None:
        question = f"{iteration}/summary/{digest_text(json.dumps(dict(values), sort_keys=True))}"
        if question not in self.sent:
            self._write(values, "iteration", iteration)
            self._remember(question)

    def _remember(self, question: str) -> None:
        """Note what was sent, once it is out of this process: a run that is killed here sends it no second time."""
        assert self.writer is not None
        self.writer.flush()
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        with open(self.memory, "a", encoding="utf-8") as file:
            file.write(f"{question}\n")
        self.sent.add(question)

    def _write(self, values: Mapping[str, float], axis: Axis, step: int) -> None:
        if self.writer is None:
            self.writer = self.opened()
        self.writer.write(values, axis, step, self.moment)

    def register(self, policies: Mapping[str, ArtifactRef]) -> None:
        """Nothing: checkpoints stay in the store."""

    def finish(self, report: Path | None, status: str = "FINISHED") -> None:
        """End the run in the tracker."""
        self._try(self._finish, status)

    def _finish(self, status: str) -> None:
        if self.writer is not None:
            self.writer.close(status)

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        if not self.working:
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever a tracker raises, none of it may end a run
            self.working = False
            message = redact(str(error).partition("\n")[0])
            self.log(
                f"{self.name} does not work ({type(error).__name__}: {message:.200}): this run is not mirrored there; "
                "nothing else is lost"
            )


class RunMirror(Protocol):
    """The copy of a run in one tracker; MLflow's (tasks/tracking.py) is one too."""

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None: ...

    def summary(self, iteration: int, values: dict[str, float]) -> None: ...

    def register(self, policies: Mapping[str, ArtifactRef]) -> None: ...

    def finish(self, report: Path | None, status: str = "FINISHED") -> None: ...


class Mirrors:
    """All copies of a run as one."""

    def __init__(self, mirrors: Sequence[RunMirror]):
        self.mirrors = mirrors

    def stage(self, iteration: int, record: ArtifactRecord, cached: bool, stage_name: str) -> None:
        for mirror in self.mirrors:
            mirror.stage(iteration, record, cached, stage_name)

    def summary(self, iteration: int, values: dict[str, float]) -> None:
        for mirror in self.mirrors:
            mirror.summary(iteration, values)

    def register(self, policies: Mapping[str, ArtifactRef]) -> None:
        for mirror in self.mirrors:
            mirror.register(policies)

    def finish(self, report: Path | None, status: str = "FINISHED") -> None:
        for mirror in self.mirrors:
            mirror.finish(report, status)
