"""The held-out part of the evaluate stage: the same numbers however many prompts are read at a time."""

import numpy as np
import pytest

from data_contracts.checkpoint import external_model
from data_contracts.errors import ContractError
from data_contracts.shards import read_shards
from data_contracts.store import Store
from stages.evaluation import heldout, intervals
from stages.execute import execute
from stages.models.logps import Pass
from stages.stage import STAGES

CONFIG = {
    "scorer": {"name": "length", "target_tokens": 4},
    "dtype": "float32",
    "best_of": [1, 2],
    "rouge_l": True,
    "runtime": {"device": "cpu"},
}


def answers(count: int, texts: list[str]) -> list[dict]:
    """Two answers to each prompt: all first ones, last prompt first, then all second ones."""
    return [
        {"prompt_id": f"p{number:03d}", "candidate": k, "prompt_ids": [60, number], "token_ids": [70] * (1 + k + number % 3),
         "token_logps": [-1.0] * (1 + k + number % 3), "finish_reason": "stop" if k else "length", "seed": 0,
         "completion": texts[number] if k == 0 else f"another text {number % 4}"}
        for k in range(2) for number in reversed(range(count))
    ]  # fmt: skip


@pytest.fixture
def evaluated(tmp_path, tiny_model, make_prompts, make_artifact, make_rows, monkeypatch):
    """evaluated(name, rows) -> rows of `heldout` and of `eval_report`; the start model's log-probs are made up."""

    def made_up(_, rows):
        return [np.full(len(response), -float(prompt[1]), np.float32) for prompt, response in rows]

    monkeypatch.setattr(Pass, "_score_within_context", made_up)

    def run(name: str, rows: list[dict]) -> tuple[list[dict], list[dict]]:
        store, model = Store(tmp_path / name), external_model(tiny_model)
        inputs = {
            "prompts": make_prompts(store, make_rows(7)),
            "generations": make_artifact(store, "generations", rows),
        }
        config = STAGES["evaluate"].parse(CONFIG)
        record = execute(STAGES["evaluate"], config, inputs | {"policy": model, "start": model}, store)
        out = store.directory("eval_report", record.key)
        table = read_shards(out, "heldout", prefix="heldout")
        return table.to_pylist(), read_shards(out, "eval_report").to_pylist()

    return run


def test_prompts_are_read_a_few_at_a_time_and_the_numbers_stay(evaluated, make_rows, monkeypatch):
    rows = answers(7, [row["response"] for row in make_rows(7)])
    table, report = evaluated("at_once", rows)
    assert [(row["prompt_id"], row["candidate"]) for row in table] == [
        (f"p{number:03d}", k) for number in reversed(range(7)) for k in range(2)
    ]
    assert [row["start_logp"] for row in table] == [-float(number) for number in reversed(range(7)) for _ in range(2)]
    values = {row["metric"]: row["value"] for row in report}
    assert values["start_logp"] == -3.0 and 0.5 <= values["rouge_l"] < 0.6  # the first answers are the references
    assert values["distinct_rate"] == pytest.approx(11 / 14) and values["best_of_2"] > values["best_of_1"]
    monkeypatch.setattr(heldout, "PROMPTS_AT_ONCE", 2)
    monkeypatch.setattr(intervals, "PICKS_AT_ONCE", 100)
    assert evaluated("in_parts", rows) == (table, report)


@pytest.mark.parametrize("change", [lambda rows: rows[2:6], lambda rows: [*rows, rows[0] | {"prompt_id": "stray"}]])
def test_answers_that_are_not_of_the_prompts_are_refused(evaluated, make_rows, change):
    rows = change(answers(7, [row["response"] for row in make_rows(7)]))
    with pytest.raises(ContractError, match="are not of the held-out prompts"):
        evaluated("other", rows)
