"""Whole runs with a tiny model, as a user starts them: build everything, find everything, rebuild only what a change touches."""

import json
import shutil
import sqlite3

import pytest

from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.cli.commands import main
from flows.cli.play import found_whole
from flows.config import load_run
from flows.forecast.rehearsal import rehearse
from flows.tracked import forget_complete, is_noted_complete, note_complete

STAGES_OF_TWO_ITERATIONS = (
    2 + 2 * 6
)  # sample and evaluate the start, then sample, score, weigh, train, sample, evaluate


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A store of one's own in which the undisturbed run is already built."""
    return shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True)


def test_two_iterations_end_with_a_table_a_headline_and_a_report(undisturbed):
    first = undisturbed.first
    assert len(first.names("Completed()")) == STAGES_OF_TWO_ITERATIONS + 3  # the three prompt sets
    assert (
        "gain " in first.table
        and ", at equal length " in first.table
        and "(95 %, paired bootstrap over " in first.table
    )
    report = undisturbed.store / "runs" / "tiny" / "report.md"
    assert str(report) in first.table
    assert "iteration 2 (" in report.read_text()


def test_every_artifact_is_signed_and_intact(undisturbed):
    store = Store(undisturbed.store)
    records = list(store.records())
    assert len([record for record in records if record.kind != "prompts"]) == STAGES_OF_TWO_ITERATIONS
    assert not [problem for record in records for problem in store.problems(record, deep=True)]
    assert {record.provenance["starts"] for record in records if record.kind != "prompts"} == {1}


def test_each_iteration_samples_from_the_policy_that_the_one_before_trained(undisturbed):
    def record(step, name):
        return json.loads((undisturbed.store / "runs" / "tiny" / step / name / "record.json").read_text())

    trained = record("iter_01", "train")
    assert record("iter_02", "sample")["inputs"]["policy"]["key"] == trained["key"]
    assert record("iter_02", "weigh")["inputs"]["reference"]["key"] == trained["key"]
    assert record("iter_02", "train")["inputs"]["policy"]["key"] == trained["key"]
    assert trained["inputs"]["policy"]["key"] == "external"


def test_iterations_train_on_different_prompts_and_never_on_heldout_ones(undisturbed):
    def ids(step, name):
        return set(read_shards(undisturbed.store / "runs" / "tiny" / step / name, "prompts")["prompt_id"].to_pylist())

    parts = [ids("iter_01", "prompts"), ids("iter_02", "prompts"), ids("iter_00", "heldout_prompts")]
    assert [len(part) for part in parts] == [12, 12, 8]
    assert len(set.union(*parts)) == 32


def test_run_again_without_mlflow_it_builds_nothing_and_prints_the_same_table(undisturbed, copy, tools):
    """MLflow being away costs one line and not the run."""
    again = tools.play(undisturbed.config, copy, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert again.code == 0, again.out
    assert len(again.names("Cached")) == STAGES_OF_TWO_ITERATIONS
    assert again.table == undisturbed.first.table.replace(str(undisturbed.store), str(copy))
    assert again.out.count("MLflow at http://127.0.0.1:9 does not work") == 1
    assert again.seconds < 90


def test_a_complete_run_prints_the_same_table_without_prefect_and_mlflow(undisturbed, copy, capsys, monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    config, store = load_run(undisturbed.config), Store(copy)
    assert found_whole(config, store) is None  # its MLflow is that of another store: the copy's has to be told
    note_complete(config, store)
    monkeypatch.setattr("flows.cli.play.prefect_server", None)
    assert main(["run", str(undisturbed.config), "--store", str(copy)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run tiny is complete: nothing is built")
    table = undisturbed.first.table.replace(str(undisturbed.store), str(copy))
    assert out[out.index("self-play run ") :] == table

    assert found_whole(config.model_copy(update={"seed": 1}), store) is None
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert found_whole(config, store) is None  # somebody watches that server
    monkeypatch.delenv("PREFECT_API_URL")
    shard = next((copy / "runs" / "tiny" / "iter_02" / "evaluate").resolve().glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert found_whole(config, store) is None
    forget_complete(config, store)
    assert not is_noted_complete(config, store)


def found_and_built(undisturbed, **changes) -> tuple[set[str], set[str]]:
    """The stages that the store has of one iteration with other settings, and those that a run would build."""
    config = load_run(undisturbed.config, {"iterations": 1} | changes)
    found, built = set(), set()
    for step in rehearse(config, Store(undisturbed.store)).steps:
        (found if step.record else built).add(f"{step.name}-iter_{step.iteration:02d}")
    return found, built


def test_another_learning_rate_rebuilds_training_and_what_follows(undisturbed):
    found, built = found_and_built(undisturbed, **{"training.learning_rate": 0.0005})
    assert built == {"train-iter_01", "heldout_generations-iter_01", "evaluate-iter_01"}
    assert len(found) == 2 + 3


def test_another_loss_trains_on_the_same_pairs(undisturbed):
    found, built = found_and_built(undisturbed, method={"name": "dpo", "beta": 0.2})
    assert {"sample-iter_01", "score-iter_01"} <= found
    assert {"train-iter_01", "evaluate-iter_01"} <= built


def test_spin_prefers_the_ground_truth_to_the_same_samples(undisturbed, copy, tools):
    """A real run with other settings: it finds and builds what the rehearsal says."""
    other = tools.play(undisturbed.config, copy, "method={name: spin}", "iterations=1", "name=other")
    assert other.code == 0, other.out
    found, built = found_and_built(undisturbed, method={"name": "spin"})
    assert set(other.names("Cached")) == found and "sample-iter_01" in found
    assert {name for name in other.names("Completed()") if "prompts" not in name} == built
    assert {"score-iter_01", "train-iter_01"} <= built
    prompts = read_shards(copy / "runs" / "other" / "iter_01" / "prompts", "prompts").to_pylist()
    pairs = read_shards(copy / "runs" / "other" / "iter_01" / "score", "scored_pairs").to_pylist()
    assert {pair["prompt_id"]: pair["chosen"] for pair in pairs} == {
        prompt["prompt_id"]: prompt["response"] for prompt in prompts
    }


def test_mlflow_has_a_parent_run_and_a_child_for_each_iteration(undisturbed):
    with sqlite3.connect(f"file:{undisturbed.store}/mlflow.db?mode=ro", uri=True) as database:
        runs = dict(database.execute("select run_uuid, name from runs"))
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        status = {row[0] for row in database.execute("select status from runs")}
        seconds = {
            row[0] for row in database.execute("select distinct key from metrics where key like '%/seconds/wall'")
        }
        digests = [row[0] for row in database.execute("select value from tags where key = 'digest.train'")]
        curve = database.execute("select count(*) from metrics where key = 'curve/loss'").fetchone()[0]
    children = [runs[child] for child, parent in parents.items() if runs[parent] == "tiny"]
    assert {"iter_00", "iter_01", "iter_02"} <= set(children)
    assert status == {"FINISHED"}
    assert {
        f"{name}/seconds/wall" for name in ("sample", "score", "weigh", "train", "evaluate", "heldout_generations")
    } == seconds
    assert all(len(digest) == 64 for digest in digests)
    assert curve >= 6


@pytest.mark.slow
def test_two_iterations_with_vllm_build_once_and_are_found_again(make_run, tmp_path, tools):
    pytest.importorskip("vllm")
    config = make_run("engine", sampling={"backend": {"name": "vllm"}, "runtime": {"prompts_per_shard": 12}})
    first = tools.play(config, tmp_path / "store")
    assert first.code == 0, first.out
    assert len(first.names("Completed()")) == STAGES_OF_TWO_ITERATIONS + 3
    again = tools.play(config, tmp_path / "store")
    assert again.out.startswith("run engine is complete")
    assert again.table == first.table
