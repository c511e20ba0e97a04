"""Tasks - where copies of a run are written beside MLflow: TensorBoard, Weights & Biases, Trackio. None is imported unasked."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_contracts.config import flatten
from data_contracts.redaction import redact, redact_value
from data_contracts.store import Store
from tasks.trackers import (
    Axis,
    Described,
    Mirror,
    TensorBoardConfig,
    TrackingConfig,
    TrackioConfig,
    WandbConfig,
    Writer,
)


def _package(name: str) -> Any:
    """Import a module of an optional extra; its types are not known here."""
    return importlib.import_module(name)


class TensorBoardWriter:
    """An event file, written by TensorBoard's own package, which needs neither TensorFlow nor PyTorch."""

    def __init__(self, config: TensorBoardConfig, store: Store, run: str, described: Described):
        self.Event: Any = _package("tensorboard.compat.proto.event_pb2").Event
        self.Summary: Any = _package("tensorboard.compat.proto.summary_pb2").Summary
        root = Path(config.directory) if config.directory else store.root / "tensorboard"
        file_writer = _package("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self.file = file_writer(str(root / f"{run}-{described.digest[:8]}"))
        self._text("description", described.note)
        self._text("settings", f"```json\n{json.dumps(redact_value(described.settings), indent=1)}\n```")

    def _text(self, tag: str, markdown: str) -> None:
        types = _package("tensorboard.compat.proto.types_pb2")
        tensor = _package("tensorboard.compat.proto.tensor_pb2").TensorProto(
            dtype=types.DT_STRING, string_val=[redact(markdown).encode()]
        )
        tensor.tensor_shape.dim.add(size=1)
        text = _package("tensorboard.plugins.text.metadata")
        metadata = text.create_summary_metadata(display_name="", description="")
        value = self.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self.file.add_event(self.Event(wall_time=time.time(), step=0, summary=self.Summary(value=[value])))

    def write(self, values: Mapping[str, float], axis: Axis, step: int, seconds: float) -> None:
        points = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.file.add_event(self.Event(wall_time=seconds, step=step, summary=self.Summary(value=points)))

    def flush(self) -> None:
        self.file.flush()

    def close(self, status: str) -> None:
        self.file.close()


class WandbWriter:
    """A run of Weights & Biases; the same settings go on in the same one."""

    def __init__(self, config: WandbConfig, store: Store, run: str, described: Described):
        wandb = _package("wandb")
        directory = store.run_directory(run)
        directory.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode or os.environ.get("WANDB_MODE") or "online",
            name=run,
            id=f"{run}-{described.digest}",
            resume="allow",
            config=redact_value(flatten(described.settings)),
            tags=[f"{name}: {value}"[:64] for name, value in described.tags.items()],
            notes=redact(described.note),
            dir=str(directory),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
        )
        for axis, pattern in (("step", "curve/*"), ("iteration", "*")):
            self.run.define_metric(axis, hidden=True)
            self.run.define_metric(pattern, step_metric=axis)

    def write(self, values: Mapping[str, float], axis: Axis, step: int, seconds: float) -> None:
        self.run.log({**values, axis: step})

    def flush(self) -> None:
        pass  # another process has it already

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)


class TrackioWriter:
    """A run of Trackio, whose interface is that of Weights & Biases in small."""

    def __init__(self, config: TrackioConfig, store: Store, run: str, described: Described):
        self.trackio = _package("trackio")
        settings = redact_value(flatten(described.settings)) | {
            f"tag.{name}": text for name, text in described.tags.items()
        }
        self.trackio.init(
            project=config.project,
            name=f"{run}-{described.digest[:8]}",
            space_id=config.space_id,
            config=settings,
            resume="allow",
            auto_log_cpu=False,  # the stages run in other processes
            auto_log_gpu=False,
        )

    def write(self, values: Mapping[str, float], axis: Axis, step: int, seconds: float) -> None:
        # `step` is Trackio's own x-axis, of every series for itself: curves have optimizer steps there, the others iterations.
        self.trackio.log(dict(values), step=step)

    def flush(self) -> None:
        pass  # another thread writes it within a second

    def close(self, status: str) -> None:
        self.trackio.finish()


WRITERS: dict[str, Callable[..., Writer]] = {
    "wandb": WandbWriter,
    "tensorboard": TensorBoardWriter,
    "trackio": TrackioWriter,
}


def other_mirrors(
    config: TrackingConfig, store: Store, run: str, described: Described, log: Callable[[str], None]
) -> list[Mirror]:
    """Return a mirror for each tracker that is asked for; none of them is open yet."""
    return [
        Mirror(
            name,
            store,
            run,
            described,
            log,
            lambda name=name, settings=settings: WRITERS[name](settings, store, run, described),
        )
        for name, settings in config.chosen().items()
    ]
