"""Models beside the policy that cannot do what is asked of them are refused before anything runs: `preflight` on whole run configs."""

import json
import shutil

import pytest

import flows.preflight
from data_contracts.errors import ConfigError, ContractError
from data_contracts.store import Store
from flows.config import load_run
from flows.preflight import preflight
from stages.methods import METHODS
from stages.training.stage import check_rows


@pytest.fixture
def run_with(make_run, tmp_path, monkeypatch):
    """run_with(sections) -> the ConfigError of its preflight."""
    monkeypatch.setattr(
        flows.preflight, "fit_to_model", lambda prepared, *_: prepared
    )  # the prompts are fine; see test_bad_input.py

    def check(**sections) -> str:
        with pytest.raises(ConfigError) as refused:
            preflight(load_run(make_run("misfit", **sections)), Store(tmp_path / "store"))
        assert not (tmp_path / "store").exists()
        return str(refused.value)

    return check


@pytest.fixture(scope="module")
def other_tokens(make_model, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other") / "model", seed=3, vocabulary=300)


def test_a_reward_model_with_another_tokenizer_is_refused(run_with, other_tokens):
    message = run_with(method={"name": "tgdpo"}, models={"reward_model": {"path": str(other_tokens)}})
    assert "models.reward_model" in message and "another tokenizer than the policy" in message


@pytest.mark.parametrize("role", ["positive", "negative"])
def test_a_contrastive_model_with_another_tokenizer_is_refused(run_with, other_tokens, tiny_model, role):
    models = {"positive": {"path": str(tiny_model)}, "negative": {"path": str(tiny_model)}} | {
        role: {"path": str(other_tokens)}
    }
    assert f"models.{role}" in run_with(method={"name": "tis_dpo"}, models=models)


def test_a_teacher_whose_tokenizer_has_no_offsets_is_refused(run_with, other_tokens, tmp_path):
    import shutil

    slow = shutil.copytree(other_tokens, tmp_path / "slow")
    vocabulary = json.loads((slow / "tokenizer.json").read_text())["model"]["vocab"]
    (slow / "tokenizer.json").unlink()
    (slow / "vocab.json").write_text(json.dumps(vocabulary))
    assert "cannot be aligned" in run_with(method={"name": "swift"}, models={"teacher": {"path": str(slow)}})


def test_swift_without_a_teacher_is_refused(run_with):
    assert "needs models.teacher" in run_with(method={"name": "swift"})


def test_weights_where_the_formula_has_no_place_for_them_are_refused(run_with):
    assert "no place for per-token weights" in run_with(
        method={"name": "orpo"}, weighting={"weights": {"name": "random"}}
    )


def test_one_candidate_cannot_make_a_pair(run_with):
    assert "sampling.num_candidates >= 2" in run_with(sampling={"num_candidates": 1})


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("chosen_weights", [1.0], "chosen_weights has 1 values for 2 tokens"),
        ("rejected_weights", [1.0, float("nan")], "rejected_weights holds NaN or infinity"),
        ("chosen_reference_logps", None, "chosen_reference_logps has 0 values for 2 tokens"),
        ("rejected_reference_logps", [float("-inf"), -1.0], "rejected_reference_logps holds NaN or infinity"),
    ],
)
def test_a_damaged_row_is_named_by_row_and_column_before_training(column, value, problem):
    sides = {
        f"{side}_{name}": values
        for side in ("chosen", "rejected")
        for name, values in (("ids", [1, 2]), ("weights", [1.0, 1.0]), ("reference_logps", [-1.0, -2.0]))
    }
    rows = [sides | {"pair_id": "a"}, sides | {"pair_id": "b", column: value}]
    with pytest.raises(ContractError, match=rf"row 1 \(pair_id b\): {problem}"):
        check_rows(rows, METHODS.config("dpo"))


def test_a_teacher_with_a_vocabulary_of_another_size_is_refused_before_training(run_with, tiny_model, tmp_path):
    padded = shutil.copytree(tiny_model, tmp_path / "padded")
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    sections = {"models": {"teacher": {"path": str(padded)}}, "scoring": {"pairing": "truth"}}
    message = run_with(method={"name": "kd"}, **sections)
    assert "gives logits of 384 ids" in message and "of 320" in message and "common_vocabulary: true" in message
