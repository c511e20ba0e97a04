"""Everybody against everybody, and the checkpoint of a training that goes on: by hand, then in one run of the whole loop.

Strategy: the run keeps two checkpoints per training and plays a tournament with a baseline; the same run without the checkpoints must
train the very same weights. Its judge is the length of an answer, the other run's is away.
"""

import math
import shutil
from pathlib import Path

import pytest

from data_contracts.artifact import ArtifactRecord
from data_contracts.checkpoint import check_model_directory
from data_contracts.errors import ConfigError
from data_contracts.gc import _with_inputs
from data_contracts.identity import digest_file
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from data_contracts.store import Store
from flows.config import load_run
from flows.preflight import preflight
from flows.tournament import merged, standing
from stages.training.batches import kept_steps

ROOT = Path(__file__).resolve().parents[2]


def scored(tmp_path, rows):
    """A finished artifact with these raw scores; only its path is read."""
    base = {"scores": None, "preference_logits": None, "reasons": ["", ""]}
    write_shard(
        shard_path(tmp_path, 0, "scores"),
        to_table([base | {"prompt_id": f"p{i}"} | row for i, row in enumerate(rows)], "scores"),
    )
    return type("Ref", (), {"path": str(tmp_path)})


def test_of_two_scores_the_higher_one_wins_and_what_has_none_is_in_no_mean(tmp_path):
    found = standing(
        "x", ["a", "b"], scored(tmp_path, [{"scores": [1.0, 0.0]}, {"scores": [0.5, 0.5]}, {"scores": [None, 1.0]}]), 3
    )
    assert found.rates == [[0.5, 0.75], [0.25, 0.5]]  # a win and a tie
    assert (found.failed, found.prompts) == (1, 3)


def test_a_pair_scorers_liking_for_a_place_cancels(tmp_path):
    first = 0.7  # for standing first, in logits
    rows = [
        {"preference_logits": [0.0, math.log(3) + first, -math.log(3) + first, 0.0]},
        {"preference_logits": [0.0, math.nan, 0.2, 0.0]},
    ]
    found = standing("x", ["a", "b"], scored(tmp_path, rows), 2)
    assert found.rates[0][1] == pytest.approx(0.75)
    assert found.rates[1][0] == pytest.approx(0.25)
    assert found.failed == 1


def test_where_every_comparison_failed_there_is_no_rate(tmp_path):
    found = standing("x", ["a", "b"], scored(tmp_path, [{"preference_logits": [0.0, math.nan, math.nan, 0.0]}]), 1)
    assert found.rates == [[0.5, None], [None, 0.5]]
    away = standing("x", ["a", "b", "c"], None, 5)
    assert (away.rates[0], away.failed, away.prompts) == ([0.5, None, None], 15, 5)


def test_answers_of_several_policies_become_the_candidates_of_one(store, make_artifact):
    def answers(text, count):
        return make_artifact(store, "generations", [
            {"prompt_id": f"p{i}", "candidate": k, "prompt_ids": [1], "token_ids": [2, 1], "token_logps": [-1.0, -1.0], "finish_reason": "stop",
             "seed": k, "completion": f"{text} {i} {k}"}
            for i in range(2) for k in range(count)
        ])  # fmt: skip

    players = {"0": answers("start", 1), "other": answers("other", 3)}
    ref = merged(players, store)
    found = [
        (row["prompt_id"], row["candidate"], row["completion"])
        for row in read_shards(ref.path, "generations").to_pylist()
    ]
    assert found == [("p0", 0, "start 0 0"), ("p0", 1, "other 0 0"), ("p1", 0, "start 1 0"), ("p1", 1, "other 1 0")]
    assert merged(players, store) == ref


def test_a_training_is_kept_for_as_long_as_one_of_its_checkpoints_is_needed(store):
    def sign(kind, key, **inputs):
        store.directory(kind, key).mkdir(parents=True)
        (store.directory(kind, key) / "data").write_text(key)
        record = ArtifactRecord(
            kind=kind, key=key, stage="x", version="1", config={}, inputs=inputs, content="", files=[], rows=0
        )
        return store.sign(record).ref(str(store.directory(kind, key)))

    trained = sign("checkpoint", "abc")
    middle = trained.model_copy(update={"key": "abc/steps/000004"})
    sign("generations", "def", policy=middle)
    assert _with_inputs(store, {("generations", "def")}) == {("generations", "def"), (trained.kind, trained.key)}


@pytest.mark.parametrize(
    ("total", "parts", "kept"),
    [(10, (), set()), (10, (0.5,), {5}), (10, (0.01, 0.99, 0.96), {1}), (3, (0.34, 0.67), {1, 2}), (1, (0.5,), set())],
)
def test_steps_after_which_a_checkpoint_is_kept(total, parts, kept):
    assert kept_steps(total, parts) == kept


@pytest.fixture(scope="module")
def played(tmp_path_factory, make_run, make_model, tiny_model, tools):
    work = tmp_path_factory.mktemp("tournament")
    config = str(make_run("best", training={"learning_rate": 2e-3, "epochs": 2}))
    other = make_model(work / "other", seed=3)
    base = {"iterations": 1, "gate": {"min_prompts": 2}}
    tournament = {"scorer": {"name": "length", "target_tokens": 4}, "baselines": {"other": {"path": str(other)}}}
    judge = {
        "name": "llm_judge",
        "model": "m",
        "mode": "pairwise",
        "runtime": {"base_url": "http://127.0.0.1:9/v1", "retries": 0},
    }
    cases = [
        {"id": "plain", "config": config, "set": base | {"tournament": {"scorer": judge}}},
        {
            "id": "kept",
            "config": config,
            "set": base | {"training.checkpoints": [0.3, 0.6], "tournament": tournament},
        },
    ]
    results = tools.play_cases(cases, work)
    assert not any("error" in result for result in results.values()), results
    return results


def test_checkpoints_are_whole_models_and_cost_the_training_nothing(played):
    paths = [Path(path) for path in played["kept"]["iterations"][0]["checkpoints"]["paths"]]
    assert [path.name for path in paths[:-1]] == ["000002", "000004"]  # of 6 steps
    for path in paths:
        check_model_directory(path)
    weights = [digest_file(path / "model.safetensors") for path in paths]
    assert len(set(weights)) == 3
    end = Path(played["plain"]["final"]) / "model.safetensors"
    assert weights[-1] == digest_file(end)
    # The training's own artifact lists and signs them, so a damaged one is noticed.
    record = Store(paths[-1].parents[2]).load("checkpoint", paths[-1].name)
    assert {f"steps/{path.name}/model.safetensors" for path in paths[:-1]} < {file.name for file in record.files}


def test_the_checkpoint_that_measures_best_goes_on(played):
    found = played["kept"]["iterations"][0]["checkpoints"]
    assert len(set(found["content"])) == 3
    assert len(set(found["scores"])) > 1
    assert played["kept"]["final"] == found["paths"][found["chosen"]]


def test_the_tournament_holds_every_iteration_and_the_baselines(played):
    found = played["kept"]["tournament"]
    assert found["names"] == ["0", "1", "other"]
    for i in range(3):
        for j in range(3):
            assert found["rates"][i][j] + found["rates"][j][i] == pytest.approx(1)
    assert found["rates"][0][1] != 0.5
    assert (found["failed"], found["prompts"]) == (0, 8)


def test_a_run_ends_well_whose_tournament_has_no_judge(played):
    found = played["plain"]["tournament"]
    assert found["rates"] == [[0.5, None], [None, 0.5]]
    assert found["failed"] == found["prompts"] == 8
    assert "127.0.0.1:9" in played["plain"]["unanswered"] and played["kept"]["unanswered"] == "None"


def test_a_run_whose_tournament_has_no_judge_ends_with_75_after_its_report(undisturbed, tools, tmp_path):
    store = shutil.copytree(undisturbed.store, tmp_path / "store", symlinks=True)
    (store / "runs" / "tiny" / "report.md").unlink()
    judge = "{name: llm_judge, model: m, mode: pairwise, runtime: {base_url: 'http://127.0.0.1:9/v1', retries: 0}}"
    ended = tools.play(undisturbed.config, store, f"tournament={{scorer: {judge}}}")
    assert ended.code == 75 and "127.0.0.1:9" in ended.out, ended.out
    assert (store / "runs" / "tiny" / "report.md").is_file()


def test_settings_of_the_tournament_change_no_key_and_its_baselines_are_checked(make_run, store):
    def load(**evaluation):
        return load_run(make_run("t", evaluation=evaluation))

    plain = load()
    playing = load(
        tournament={"scorer": {"name": "length", "target_tokens": 4}, "baselines": {"other": {"path": "none"}}}
    )
    assert plain.evaluation.identity() == playing.evaluation.identity()
    assert "checkpoints" not in plain.training.identity()
    with pytest.raises(ConfigError, match="the model directory none does not exist"):
        preflight(playing, store)
    named = load(
        tournament={"scorer": {"name": "length", "target_tokens": 4}, "baselines": {"1": plain.policy.model_dump()}}
    )
    with pytest.raises(ConfigError, match="would be taken for an iteration"):
        preflight(named, store)
