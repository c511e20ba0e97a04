"""The copies in other trackers than MLflow: what they get, once, and that none of it can end a run.

Strategy: a writer that remembers stands for every tracker; TensorBoard and Weights & Biases (offline) are also tried
with their own packages, where those are installed.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.artifact import ArtifactRecord
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import load_run
from tasks import trackers
from tasks.trackers import Described, Mirror, Mirrors, TrackingConfig
from tasks.writers import other_mirrors

DESCRIBED = Described({"method": {"name": "sppo"}, "seed": 0}, {"method": "sppo", "seed": "0"}, "**a run**")


def checkpoint(store: Store, key: str) -> ArtifactRecord:
    """A training of three steps."""
    directory = store.directory("checkpoint", key * 16)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    return ArtifactRecord(
        kind="checkpoint", key=key * 16, stage="train", version="1", config={}, inputs={}, content=key * 64, files=[],
        rows=0, metrics={"loss": 0.25}, seconds={"wall": 2.0},
        provenance={"time": "2026-11-28T10:00:00+0000"},
    )  # fmt: skip


class Remembering:
    """A writer into a list."""

    def __init__(self):
        self.points, self.status = [], None

    def write(self, values, axis, step, seconds):
        self.points += [(name, axis, step, value) for name, value in values.items()]

    def flush(self):
        pass

    def close(self, status):
        self.status = status


def play(mirror, store: Store, count: int = 2) -> None:
    for iteration, key in enumerate("ab"[:count], 1):
        mirror.stage(iteration, checkpoint(store, key), False, "train")
        mirror.summary(iteration, {"heldout_score": 0.1 * iteration})
    mirror.finish(None)


def test_numbers_lie_over_the_iteration_and_steps_over_the_whole_run(store):
    writer, logged = Remembering(), []
    play(Mirror("stand-in", store, "tiny", DESCRIBED, logged.append, lambda: writer), store)
    assert ("train/loss", "iteration", 2, 0.25) in writer.points
    assert ("heldout_score", "iteration", 2, 0.2) in writer.points
    steps = [(step, value) for name, _, step, value in writer.points if name == "curve/loss"]
    assert steps == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 1.0), (5, 0.5), (6, 1 / 3)]
    assert writer.status == "FINISHED" and logged == []


def test_a_run_that_finds_everything_opens_no_tracker_and_one_that_goes_on_sends_the_rest(store):
    writers = []

    def opened():
        writers.append(Remembering())
        return writers[-1]

    for count in (1, 2, 2):
        play(Mirror("stand-in", store, "tiny", DESCRIBED, print, opened), store, count)
    assert len(writers) == 2
    assert {step for name, axis, step, _ in writers[1].points if axis == "step"} == {4, 5, 6}
    play(Mirror("stand-in", store, "tiny", DESCRIBED._replace(settings={"seed": 1}), print, opened), store)
    assert len(writers) == 3 and len(writers[2].points) > len(writers[1].points)


@pytest.mark.parametrize("moment", ["open", "write", "close"])
def test_a_tracker_that_fails_costs_one_line(store, moment):
    class Failing(Remembering):
        pass

    def fail(*_):
        raise ConnectionError("gone\nfor good")

    setattr(Failing, moment, fail)
    logged, other = [], Remembering()

    def opened():
        return fail() if moment == "open" else Failing()

    broken = Mirror("stand-in", store, "tiny", DESCRIBED, logged.append, opened)
    whole = Mirror("another", store, "tiny", DESCRIBED, logged.append, lambda: other)
    play(Mirrors([broken, whole]), store)
    assert logged == [
        "stand-in does not work (ConnectionError: gone): this run is not mirrored there; nothing else is lost"
    ]
    assert other.status == "FINISHED"


def test_a_tracker_whose_package_is_missing_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        TrackingConfig.model_validate({"trackio": {}}).check()
    assert str(refused.value) == (
        "tracking.trackio needs the package trackio, which is not installed: `pip install trackio`, or remove "
        "tracking.trackio"
    )
    TrackingConfig().check()


def test_trackers_change_no_artifact():
    plain = load_run("deploy/runs/quickstart.yaml")
    tracked = load_run("deploy/runs/quickstart.yaml", {"tracking": {"wandb": {"mode": "offline"}, "tensorboard": {}}})
    assert list(tracked.tracking.chosen()) == ["wandb", "tensorboard"] and plain.tracking.chosen() == {}
    for section in ("sampling_for_training", "scoring_for_pairs", "weighting_for_pairs"):
        assert getattr(plain, section)().identity() == getattr(tracked, section)().identity()
    settings = [run.model_dump(mode="json") for run in (plain, tracked)]
    assert len({Described(settings, {}, "").digest for settings in settings}) == 1


def mirror_of(store: Store, **settings) -> tuple[Mirror, list[str]]:
    logged: list[str] = []
    [mirror] = other_mirrors(TrackingConfig.model_validate(settings), store, "tiny", DESCRIBED, logged.append)
    return mirror, logged


def test_trackio_has_steps_as_its_own_axis(store, monkeypatch):
    """A value called `step` is renamed by Trackio 0.43, with a warning, and then every curve is drawn over a counter."""
    logged = []
    stand_in = SimpleNamespace(
        init=lambda **_: None, finish=lambda: None, log=lambda values, step: logged.append((step, values))
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    mirror, problems = mirror_of(store, trackio={})
    play(mirror, store)
    assert problems == []
    assert [(step, values) for step, values in logged if "curve/loss" in values][3] == (4, {"curve/loss": 1.0})
    assert (2, {"heldout_score": 0.2}) in logged


def test_tensorboard_reads_what_was_written(store):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirror, logged = mirror_of(store, tensorboard={})
    play(mirror, store)
    assert logged == []
    [directory] = (store.root / "tensorboard").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    assert [(point.step, round(point.value, 3)) for point in events.Scalars("curve/loss")][2:4] == [
        (3, 0.333),
        (4, 1.0),
    ]
    assert [(point.step, round(point.value, 3)) for point in events.Scalars("heldout_score")] == [(1, 0.1), (2, 0.2)]
    assert events.Scalars("curve/loss")[0].wall_time == 1795860000.0
    assert (
        b"**a run**"
        in events.Tensors(
            "description/text_summary" if "description/text_summary" in events.Tags()["tensors"] else "description"
        )[0].tensor_proto.string_val
    )
    files = [path.name for path in directory.iterdir()]
    again, _ = mirror_of(store, tensorboard={})
    play(again, store)
    assert [path.name for path in directory.iterdir()] == files


def test_weights_and_biases_writes_a_run_without_a_network(store, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    mirror, logged = mirror_of(store, wandb={"mode": "offline"})
    play(mirror, store)
    assert logged == []
    [directory] = Path(store.run_directory("tiny"), "wandb").glob("offline-run-*")
    [file] = directory.glob("*.wandb")
    deadline = time.monotonic() + 120
    while b"heldout_score" not in file.read_bytes() and time.monotonic() < deadline:  # another process writes it
        time.sleep(0.2)
    assert b"curve/loss" in file.read_bytes() and b"heldout_score" in file.read_bytes()
