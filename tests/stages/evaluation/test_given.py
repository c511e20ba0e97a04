"""Given texts of held-out prompts under the policy and the start model, against numbers that plain transformers gives."""

import math

import numpy as np
import pytest

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.shards import read_shards
from data_contracts.store import Store
from stages.evaluation.given import BETA, has_given_texts
from stages.execute import execute
from stages.models.turns import Turns
from stages.stage import STAGES

CONFIG = {"scorer": {"name": "length", "target_tokens": 4}, "dtype": "float32", "runtime": {"device": "cpu"}}
METRICS = {
    "preference_accuracy",
    "preference_margin",
    "preference_loss",
    "chosen_logp",
    "rejected_logp",
    "response_logp",
}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def evaluated(tmp_path, tiny_model, make_prompts, make_artifact):
    """evaluated(prompts, policy) -> {metric: row of eval_report}, and the record."""

    def run(prompts, policy, **settings):
        store = Store(tmp_path / "store")
        rows = [
            {"prompt_id": row["prompt_id"], "candidate": 0, "prompt_ids": [60, 61, 62 + number], "token_ids": [70, 1],
             "token_logps": [-1.0] * 2, "finish_reason": "stop", "seed": 0, "completion": "word"}
            for number, row in enumerate(prompts)
        ]  # fmt: skip
        inputs = {"prompts": make_prompts(store, prompts), "generations": make_artifact(store, "generations", rows)}
        inputs |= {"policy": external_model(policy), "start": external_model(tiny_model)}
        record = execute(STAGES["evaluate"], STAGES["evaluate"].parse(CONFIG | settings), inputs, store)
        table = read_shards(store.directory("eval_report", record.key), "eval_report").to_pylist()
        return {row["metric"]: row for row in table}, record

    return run


def logp(directory, prompt_ids, ids):
    """Log-probs of a text's tokens by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].log_softmax(-1)
    return np.array([float(logits[len(prompt_ids) - 1 + i, token]) for i, token in enumerate(ids)])


def test_the_numbers_are_those_of_the_equations(evaluated, make_rows, tiny_model, other_model):
    prompts = make_rows(3)
    prompts[0] |= {"chosen": "the sea is blue", "rejected": "the wood"}
    prompts[1] |= {"chosen": "a fox", "rejected": "lazy dogs run in the rain"}
    prompts[2] |= {"response": None, "chosen": "a good answer without a bad one"}
    report, record = evaluated(prompts, other_model)
    turns, margins, chosen = Turns(tiny_model), [], []
    for number in range(2):
        texts = {side: turns.response(prompts[number][side]) for side in ("chosen", "rejected")}
        gaps = {}
        for model in (other_model, tiny_model):
            rows = {side: logp(model, [60, 61, 62 + number], ids) for side, ids in texts.items()}
            gaps[model] = rows["chosen"].sum() - rows["rejected"].sum()
            if model == other_model:
                chosen.append(rows["chosen"].mean())
        margins.append(gaps[other_model] - gaps[tiny_model])
    assert report["preference_margin"]["value"] == pytest.approx(np.mean(margins), abs=1e-3)
    losses = [math.log1p(math.exp(-BETA * margin)) for margin in margins]
    assert report["preference_loss"]["value"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert report["preference_accuracy"]["value"] == np.mean([margin > 0 for margin in margins])
    assert report["chosen_logp"]["value"] == pytest.approx(np.mean(chosen), abs=1e-4)
    truths = [logp(other_model, [60, 61, 62 + i], turns.response(prompts[i]["response"])).mean() for i in range(2)]
    assert report["response_logp"]["value"] == pytest.approx(np.mean(truths), abs=1e-4)
    assert report["response_logp"]["n"] == report["preference_margin"]["n"] == 2
    assert record.metrics["heldout/preference_loss"] == report["preference_loss"]["value"]


def test_the_start_model_prefers_nothing_over_itself(evaluated, make_rows, tiny_model):
    prompts = [row | {"response": None, "chosen": "the sea", "rejected": "the wood"} for row in make_rows(2)]
    report, record = evaluated(prompts, tiny_model)
    assert METRICS - report.keys() == {"response_logp"}
    assert report["preference_accuracy"]["value"] == 0.5 and report["preference_margin"]["value"] == 0
    assert report["preference_loss"]["value"] == pytest.approx(math.log(2))
    assert record.cost["cache_hits"] >= 4  # the start model's pass is not made twice


def test_prompts_without_given_texts_give_the_same_report_under_the_same_key_as_ever(evaluated, make_rows, tiny_model):
    prompts = [row | {"response": None} for row in make_rows(2)]
    report, record = evaluated(prompts, tiny_model)
    assert not METRICS & report.keys()
    assert "given_texts" not in record.config and "template" not in record.config
    _, other = evaluated(prompts, tiny_model, template="plain")
    assert other.key == record.key


def test_given_texts_and_how_they_are_tokenised_are_part_of_the_key(tmp_path, make_prompts, make_rows):
    prompts = make_prompts(Store(tmp_path), make_rows(2))
    stage, absent = STAGES["evaluate"], ArtifactRef(kind="prompts", key="k", path="/nowhere", content=prompts.content)
    keys = {
        stage.key(stage.parse(CONFIG | settings), {"prompts": ref})
        for settings in ({}, {"template": "plain"})
        for ref in (prompts, absent)
    }
    assert len(keys) == 3  # where nothing is there to be read, nothing is added
    assert has_given_texts(prompts.path) and not has_given_texts(tmp_path)
