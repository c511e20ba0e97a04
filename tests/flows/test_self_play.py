"""Whole runs with a tiny model, as a user starts them: build everything, find everything, rebuild only what a change touches."""

import json
import shutil
import sqlite3

import pytest

from data_contracts.shards import read_shards
from data_contracts.store import Store

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
    assert "95 % interval" in first.table
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


def test_run_again_it_builds_nothing_and_prints_the_same_table(undisturbed, tools):
    again = tools.play(undisturbed.config, undisturbed.store)
    assert again.code == 0, again.out
    assert len(again.names("Cached")) == STAGES_OF_TWO_ITERATIONS
    assert again.table == undisturbed.first.table
    assert Store(undisturbed.store).root.joinpath("mlflow.db").is_file()


def test_another_learning_rate_rebuilds_training_and_what_follows(undisturbed, copy, tools):
    other = tools.play(undisturbed.config, copy, "training.learning_rate=0.0005", "iterations=1")
    assert other.code == 0, other.out
    built = [name for name in other.names("Completed()") if "prompts" not in name]
    assert built == ["train-iter_01", "heldout_generations-iter_01", "evaluate-iter_01"]
    assert len(other.names("Cached")) == 2 + 3


def test_another_loss_trains_on_the_same_pairs(undisturbed, copy, tools):
    other = tools.play(undisturbed.config, copy, "method={name: dpo, beta: 0.2}", "iterations=1", "name=other")
    assert other.code == 0, other.out
    assert {"sample-iter_01", "score-iter_01"} <= set(other.names("Cached"))
    assert {"train-iter_01", "evaluate-iter_01"} <= set(other.names("Completed()"))


def test_spin_prefers_the_ground_truth_to_the_same_samples(undisturbed, copy, tools):
    other = tools.play(undisturbed.config, copy, "method={name: spin}", "iterations=1", "name=other")
    assert other.code == 0, other.out
    assert "sample-iter_01" in other.names("Cached")
    assert {"score-iter_01", "train-iter_01"} <= set(other.names("Completed()"))
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


def test_mlflow_being_away_costs_one_line_and_not_the_run(undisturbed, copy, tools):
    run = tools.play(undisturbed.config, copy, "name=alone", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert run.code == 0, run.out
    assert run.out.count("MLflow at http://127.0.0.1:9 does not work") == 1
    assert run.seconds < 90


@pytest.mark.slow
def test_two_iterations_with_vllm_build_once_and_are_found_again(make_run, tmp_path, tools):
    pytest.importorskip("vllm")
    config = make_run("engine", sampling={"backend": {"name": "vllm"}, "runtime": {"prompts_per_shard": 12}})
    first = tools.play(config, tmp_path / "store")
    assert first.code == 0, first.out
    assert len(first.names("Completed()")) == STAGES_OF_TWO_ITERATIONS + 3
    again = tools.play(config, tmp_path / "store")
    assert len(again.names("Cached")) == STAGES_OF_TWO_ITERATIONS
    assert again.table == first.table
