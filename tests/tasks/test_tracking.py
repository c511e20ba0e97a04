"""The mirror in MLflow: what is in it, and that it never costs a run more than a line and some seconds.

Strategy: a real sqlite database, read back through MLflow's own client; a server that is not there is a port that
nobody listens on.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from data_contracts.artifact import ArtifactRecord
from data_contracts.store import Store
from tasks.trackers import Data, Described
from tasks.tracking import Tracker


def record(store: Store, key: str = "a" * 16, kind: str = "checkpoint", steps: int = 1500, **changes) -> ArtifactRecord:
    """A signed artifact with a curve of 1500 steps: more points than MLflow takes in one call."""
    directory = store.directory(kind, key)
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_text(key)
    curve = [{"step": step, "loss": 1 / step, "rewards/margins": float(step)} for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in curve) if kind == "checkpoint" else ""
    )
    fields = {
        "metrics": {"loss": 0.25, "dropped/no pair, really?": 3},
        "seconds": {"wall": 12.5, "load": 1.0},
        "provenance": {"hardware": "2 cores", "time": "2026-11-28T10:00:00+0000"},
    } | changes
    return store.sign(
        ArtifactRecord(
            kind=kind, key=key, stage="train", version="1", config={}, inputs={}, content="", files=[], rows=0, **fields
        )
    )


DESCRIBED = Described(
    {
        "method": {"name": "sppo", "eta": 20},
        "iterations": 2,
        "models": {"a@b(c)": 1, "/x//y": 2},
        "long": "x" * 1000,
        "many": {f"n{k}": k for k in range(250)},
        "execution": {"profile": "local"},
    },
    {"method": "sppo", "policy": "models/tiny", "data": "prompts.jsonl", "seed": "0", "commit": "c0ffee"},
    "**quickstart**: 2 iterations of sppo",
    (Data("training", "prompts.jsonl", "d" * 64, "data/prompts.jsonl", 24),),
)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A run of two iterations, and a client that looks at what MLflow has of it."""
    store, logged = Store(tmp_path_factory.mktemp("tracked") / "store"), []
    tracker = Tracker(store, "quickstart", logged.append, described=DESCRIBED)
    signed = record(store)
    tracker.stage(1, signed, cached=False, stage_name="train")
    tracker.stage(1, record(store, "b" * 16, "generations", metrics={"tokens": 99}), cached=True, stage_name="sample")
    tracker.stage(2, record(store, "c" * 16), cached=False, stage_name="train")
    for iteration, score in enumerate((0.1, 0.3)):
        tracker.summary(iteration, {"heldout_score": score})
    report = store.root / "report.md"
    report.write_text("# fine")
    (store.root / "plots").mkdir()
    (store.root / "plots" / "score.svg").write_text("<svg/>")
    tracker.finish(report)
    client = MlflowClient(tracking_uri=f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("self-play").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    return client, runs, signed, logged


def test_a_run_has_a_child_for_each_iteration(mirrored):
    _, runs, _, logged = mirrored
    assert logged == []
    assert runs.keys() == {"quickstart", "iter_01", "iter_02"}
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("iter_01", "iter_02")} == {
        runs["quickstart"].info.run_id
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_child_has_metrics_seconds_and_digests_of_its_stages(mirrored):
    _, runs, signed, _ = mirrored
    data = runs["iter_01"].data
    expected = {
        "train/loss": 0.25,
        "train/seconds/wall": 12.5,
        "train/cached": 0.0,
        "sample/tokens": 99.0,
        "sample/cached": 1.0,
    }
    assert expected.items() <= data.metrics.items()
    assert data.metrics["train/dropped/no pair_ really_"] == 3
    assert data.tags["digest.train"] == signed.content and data.tags["artifact.train"] == f"checkpoint/{'a' * 16}"


def test_a_curve_is_there_step_by_step(mirrored):
    client, runs, _, _ = mirrored
    points = client.get_metric_history(runs["iter_01"].info.run_id, "curve/loss")
    assert [point.step for point in sorted(points, key=lambda point: point.step)] == list(range(1, 1501))
    assert max(points, key=lambda point: point.step).value == pytest.approx(1 / 1500)


def test_the_parent_has_settings_headlines_by_iteration_and_the_report(mirrored):
    client, runs, _, _ = mirrored
    parent = runs["quickstart"]
    assert {
        "method.name": "sppo",
        "method.eta": "20",
        "iterations": "2",
        "long": "x" * 500,
        "many.n249": "249",
    }.items() <= parent.data.params.items()
    points = client.get_metric_history(parent.info.run_id, "heldout_score")
    assert [(point.step, point.value) for point in points] == [(0, 0.1), (1, 0.3)]
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["plots", "report.md"]
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "plots")] == ["plots/score.svg"]


def test_the_parent_has_the_steps_of_all_iterations_as_one_curve(mirrored):
    """So the curves of two methods lie over each other: the children's steps all begin at 1."""
    client, runs, _, _ = mirrored
    points = client.get_metric_history(runs["quickstart"].info.run_id, "curve/loss")
    by_step = {point.step: point.value for point in points}
    assert sorted(by_step) == list(range(1, 3001)) and len(points) == 3000
    assert by_step[3000] == pytest.approx(1 / 1500) and by_step[1501] == 1


def test_the_parent_has_tags_a_description_and_its_data(mirrored):
    _, runs, _, _ = mirrored
    parent = runs["quickstart"]
    tags = {"method": "sppo", "policy": "models/tiny", "data": "prompts.jsonl", "seed": "0", "commit": "c0ffee"}
    tags |= {"hardware": "2 cores", "mlflow.note.content": "**quickstart**: 2 iterations of sppo"}
    assert tags.items() <= parent.data.tags.items()
    [data] = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, data.tags[0].value) == ("prompts.jsonl", "d" * 36, "training")


def test_the_experiment_opens_on_its_training_runs(mirrored):
    """By its tag, and by a word in the address, which is all that the UI of MLflow 3.17 goes by."""
    assert mirrored[0].get_experiment_by_name("self-play").tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_that_finds_everything_adds_nothing_and_one_that_was_killed_goes_on(tmp_path):
    store, logged = Store(tmp_path / "store"), []
    artifacts = [record(store, key * 16, steps=5) for key in "ab"]

    def play(count: int, described: Described = DESCRIBED, cached: bool = True, status: str = "FINISHED") -> Tracker:
        tracker = Tracker(store, "again", logged.append, described=described)
        for iteration, artifact in enumerate(artifacts[:count], 1):
            tracker.stage(iteration, artifact, cached, "train")
            tracker.summary(iteration, {"heldout_score": 0.1 * iteration})
        tracker.finish(None, status)
        return tracker

    def everything(tracker: Tracker) -> list:
        """All runs with their tags, but for the process, and all points."""
        runs = sorted(tracker.client.search_runs([tracker.experiment]), key=lambda run: run.info.run_id)
        return [
            (run.info.status, run.info.end_time, sorted(run.data.metrics.items()), len(run.data.params),
             len(tracker.client.get_metric_history(run.info.run_id, "curve/loss")),
             len(tracker.client.get_metric_history(run.info.run_id, "heldout_score")))
            for run in runs
        ]  # fmt: skip

    first = play(1, cached=False, status="KILLED")
    second = play(2)
    assert second.parent == first.parent and len(everything(second)) == 3
    before = everything(second)
    elsewhere = DESCRIBED._replace(settings={**DESCRIBED.settings, "execution": {"profile": "slurm"}})
    for described in (DESCRIBED, elsewhere):
        assert everything(play(2, described)) == before
    other = play(1, DESCRIBED._replace(settings={"iterations": 3}))
    assert other.parent != first.parent and logged == []
    page = f"/#/experiments/1/runs/{first.parent}?workflowType=machine_learning"
    assert second.where() == f"`mlflow ui --backend-store-uri {second.uri}`, then http://127.0.0.1:5000{page}"


def test_best_and_final_are_versions_of_one_model_and_a_repeated_run_adds_none(mirrored):
    client = mirrored[0]
    root = Path(client.tracking_uri.removeprefix("sqlite:///")).parent
    store, logged = Store(root), []
    best, last = (store.load("checkpoint", key * 16).ref(str(store.directory("checkpoint", key * 16))) for key in "ac")
    for _ in range(2):  # the second time everything is cached
        tracker = Tracker(store, "quickstart", logged.append)
        tracker.register({"best": best, "final": last})
        tracker.finish(None)
    assert logged == []
    versions = client.search_model_versions("name='quickstart'")
    assert {version.version for version in versions} == {1, 2} and len(versions) == 2
    registered = client.get_model_version_by_alias("quickstart", "best")
    assert (registered.source, registered.tags["digest"]) == (Path(best.path).as_uri(), best.content)
    assert client.get_model_version_by_alias("quickstart", "final").tags["artifact"] == f"checkpoint/{'c' * 16}"
    # What the alias names is the checkpoint itself.
    from mlflow.artifacts import download_artifacts

    mlflow.set_registry_uri(client.tracking_uri)
    where = Path(
        download_artifacts("models:/quickstart@best", dst_path=str(root / "fetched"), tracking_uri=client.tracking_uri)
    )
    assert (where / "model.safetensors").read_text() == "a" * 16
    tracker = Tracker(store, "quickstart", logged.append)
    tracker.register({"best": last, "final": last})  # another one is better now
    assert client.get_model_version_by_alias("quickstart", "best").tags["digest"] == last.content
    assert len(client.search_model_versions("name='quickstart'")) == 2


@pytest.mark.slow
def test_a_server_that_takes_no_path_of_this_machine_gets_it_as_a_tag(store, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
            while True:
                try:
                    urllib.request.urlopen(f"{uri}/health", timeout=2).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                    time.sleep(0.5)
            logged, signed = [], record(store)
            for _ in range(2):
                tracker = Tracker(store, "elsewhere", logged.append, uri=uri)
                tracker.register({"best": signed.ref(str(store.directory("checkpoint", signed.key)))})
                tracker.finish(None)
            assert logged == []
            registered = tracker.client.get_model_version_by_alias("elsewhere", "best")
            assert registered.tags["path"] == str(
                store.directory("checkpoint", signed.key)
            ) and registered.source.startswith("mlflow-artifacts:")
            assert len(tracker.client.search_model_versions("name='elsewhere'")) == 1
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def test_a_server_that_does_not_answer_costs_one_warning_and_some_seconds(store):
    logged, began = [], time.monotonic()
    tracker = Tracker(store, "quickstart", logged.append, uri="http://127.0.0.1:9")
    tracker.stage(1, record(store), cached=False, stage_name="train")
    tracker.summary(1, {"heldout_score": 0.5})
    tracker.finish(None)
    assert time.monotonic() - began < 30
    assert (
        len(logged) == 1
        and logged[0].startswith("MLflow at http://127.0.0.1:9 does not work (")
        and "\n" not in logged[0]
    )


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/none/mlflow.db"])
def test_an_address_that_cannot_be_used_costs_one_warning(store, uri):
    logged = []
    tracker = Tracker(store, "quickstart", logged.append, uri=uri)
    tracker.summary(1, {"heldout_score": 0.5})
    assert len(logged) == 1 and uri in logged[0]


@pytest.mark.parametrize("words", ["gone\nfor good", ""])
def test_a_server_that_goes_away_midway_costs_one_warning(store, monkeypatch, words):
    logged = []
    # Opened already: what goes wrong is the next call.
    monkeypatch.setattr(Tracker, "_open", lambda *_: None)
    tracker = Tracker(store, "quickstart", logged.append)
    signed = record(store)

    def gone(*_):
        raise ConnectionError(words)

    monkeypatch.setattr(tracker, "_stage", gone)
    for _ in range(3):
        tracker.stage(1, signed, cached=False, stage_name="train")
    assert len(logged) == 1 and f"ConnectionError: {words[:4]})" in logged[0]


@pytest.mark.parametrize("call", ["create_registered_model", "create_model_version"])
def test_a_registry_that_refuses_costs_one_warning(store, monkeypatch, call):
    from mlflow.exceptions import MlflowException

    logged, signed = [], record(store)
    tracker = Tracker(store, "quickstart", logged.append)

    def refuse(*_, **__):
        raise MlflowException("no room")  # INTERNAL_ERROR: none of those that have an answer

    monkeypatch.setattr(tracker.client, call, refuse)
    for _ in range(2):
        tracker.register({"best": signed.ref(str(store.directory("checkpoint", signed.key)))})
    assert len(logged) == 1 and "MlflowException: no room" in logged[0]


def test_a_run_that_failed_is_marked_so_on_the_server_that_the_environment_names(store, monkeypatch):
    store.root.mkdir(parents=True)
    uri = f"sqlite:///{store.root}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    logged = []
    tracker = Tracker(store, "quickstart", logged.append)
    # MLflow refuses neither; a diverged training must not end the mirror of the run.
    tracker.stage(
        1, record(store, metrics={"loss": float("inf"), "nothing": float("nan")}), cached=False, stage_name="train"
    )
    tracker.finish(None, "FAILED")
    assert logged == [] and not (store.root / "mlflow.db").exists()
    assert MlflowClient(tracking_uri=uri).get_run(tracker.parent).info.status == "FAILED"


def test_sessions_that_were_killed_are_marked_killed_and_living_ones_are_not(store):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    trackers = {}
    for name, pid in (("killed", dead.pid), ("alive", os.getppid())):
        trackers[name] = Tracker(store, "quickstart", print)
        trackers[name].stage(1, record(store, name[0] * 16, metrics={}), cached=False, stage_name="train")
        trackers[name].client.set_tag(trackers[name].parent, "selfplay.pid", str(pid))
    other = Tracker(store, "another-run", print)
    client = Tracker(store, "quickstart", print).client

    def states(tracker: Tracker) -> set[str]:
        return {client.get_run(run).info.status for run in (tracker.parent, *tracker.children.values())}

    assert states(trackers["killed"]) == {"KILLED"}
    assert states(trackers["alive"]) == states(other) == {"RUNNING"}


def test_a_store_that_moves_takes_its_reports_along(tmp_path):
    logged = []
    before, after = tmp_path / "before", tmp_path / "after"

    def play(root: Path, text: str) -> Tracker:
        tracker = Tracker(Store(root), "quickstart", logged.append)
        checkpoint = record(Store(root), text[0] * 16)
        tracker.register({"final": checkpoint.ref(str(Store(root).directory("checkpoint", checkpoint.key)))})
        (root / "report.md").write_text(text)
        tracker.finish(root / "report.md")
        return tracker

    first = play(before, "a report")
    before.rename(after)
    second = play(after, "better report")
    assert not before.exists() and logged == []
    for tracker, text in ((first, "a report"), (second, "better report")):
        run = second.client.get_run(tracker.parent)
        assert run.info.artifact_uri == (after / "mlflow-artifacts" / tracker.parent / "artifacts").as_uri()
        assert (after / "mlflow-artifacts" / tracker.parent / "artifacts" / "report.md").read_text() == text
    sources = {version.source for version in second.client.search_model_versions("name='quickstart'")}
    assert sources == {(after / "artifacts" / "checkpoint" / (letter * 16)).as_uri() for letter in "ab"}
