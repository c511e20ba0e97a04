"""Flows - published claims, tried by a comparison: what was measured, what came out, and whether that is as claimed.

A claim orders variants by one measure, the best first. Each neighbouring pair is decided by the interval of its
difference:

    as claimed     every interval lies above 0
    against        an interval lies below 0
    not decided    else

For an equality claim (`equal_within`) every other variant is compared with the first: as claimed if all intervals lie
within +- that much, against if one lies outside entirely.

Intervals are 95 %, over seeds and prompts: both are resampled, crossed, since every seed measures the same held-out
prompts. A measure of a whole training has one number per seed; its interval is Student's.

Axes: S seeds, P prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow
from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.comparison import START, Claim, Comparison, Outcome
from flows.forecast.rehearsal import Step
from stages.evaluation.heldout import per_prompt
from stages.evaluation.intervals import Interval
from stages.models.logps import Pass
from stages.models.turns import Turns
from stages.scoring.rouge import rouge_l
from tasks.place import Purpose

Verdict = Literal["as claimed", "not decided", "against"]
DRAWS = 5000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % quantile of Student's distribution with 1, 2, ... degrees of freedom."""
Values = dict[str, float]
"""Prompt -> value; one entry named "" for a measure of a whole training."""


class Difference(NamedTuple):
    """A variant's measure less another's."""

    above: str
    below: str
    interval: Interval


class Result(NamedTuple):
    """What came of a claim."""

    claim: Claim
    means: dict[str, float]
    """By variant, in the claim's order."""
    differences: list[Difference]
    verdict: Verdict


# --- measures: (outcome, iteration, store) -> values; iteration 0 is the start model, -1 the last ---


def _answers(column: str, outcome: Outcome, iteration: int, store: Store) -> Values:
    """A column of the held-out answers."""
    return per_prompt(outcome.heldout[iteration], column)


def _rouge_l(outcome: Outcome, iteration: int, store: Store) -> Values:
    """ROUGE-L of the held-out answers against the prompts' `response`."""
    truths = {row["prompt_id"]: row["response"] for row in _prompts(_evaluation(outcome, iteration))}
    return {
        row["prompt_id"]: rouge_l(row["completion"], truth)
        for row in outcome.heldout[iteration]
        if (truth := truths[row["prompt_id"]])
    }


def _truth_logp(outcome: Outcome, iteration: int, store: Store) -> Values:
    """Log-prob of the held-out `response` under the policy, nats per token."""
    logps = _text_logps("response", outcome, iteration, store)
    return {prompt_id: float(row.mean(dtype=np.float64)) for prompt_id, row in logps.items()}


def _preference(outcome: Outcome, iteration: int, store: Store) -> Values:
    """1 where the policy makes the held-out `chosen` likelier than `rejected`, 0 where not, 1/2 for equal."""
    chosen, rejected = (_text_logps(name, outcome, iteration, store) for name in ("chosen", "rejected"))
    return {
        name: float(np.sign(chosen[name].sum(dtype=np.float64) - rejected[name].sum(dtype=np.float64)) / 2 + 0.5)
        for name in chosen
    }


def _training(metric: str, sign: float, outcome: Outcome, iteration: int, store: Store) -> Values:
    """The mean of a metric over the last iteration's training steps, times `sign`; 0 for the start model."""
    if iteration == 0:
        return {"": 0.0}
    curve = _curve(outcome, store)
    return {"": sign * float(np.mean([step[metric] for step in curve]))}


def _winner_logratio(outcome: Outcome, iteration: int, store: Store) -> Values:
    """Mean change of the log-prob of the last training's winners by that training, nats per text."""
    if iteration == 0:
        return {"": 0.0}
    rows = read_shards(_directory(outcome, "weigh", store), "weighted_pairs").to_pylist()
    after = _pass(outcome, -1, store)
    prompts, winners = ([row[name] for row in rows] for name in ("prompt_ids", "chosen_ids"))
    after.fill(prompts, winners)
    before = [sum(row["chosen_reference_logps"]) for row in rows]
    sums = [float(logps.sum(dtype=np.float64)) for logps in after.get(prompts, winners)]
    return {"": float(np.mean(sums) - np.mean(before))}


class Measure(NamedTuple):
    words: str
    values: Callable[[Outcome, int, Store], Values]


MEASURES: dict[str, Measure] = {
    "score": Measure("score of held-out answers by the checks", partial(_answers, "score")),
    "fluency": Measure(
        "log-prob of held-out answers under the start model, nats per token", partial(_answers, "start_logp")
    ),
    "rouge_l": Measure("ROUGE-L of held-out answers against the true endings", _rouge_l),
    "truth_logp": Measure("log-prob of the held-out true endings, nats per token", _truth_logp),
    "preference": Measure("share of held-out pairs whose better ending is the likelier one", _preference),
    "training_loss": Measure("training loss, mean over the steps, with a minus sign", partial(_training, "loss", -1.0)),
    "winner_logratio": Measure("change of the training winners' log-prob, nats per text", _winner_logratio),
}


def _evaluation(outcome: Outcome, iteration: int) -> Step:
    """The evaluation of an iteration's policy."""
    steps = [
        step for step in outcome.steps if step.stage == "evaluate" and step.place.purpose is not Purpose.CHECKPOINT
    ]
    return steps[iteration]


def _prompts(step: Step) -> list[PromptRow]:
    assert step.record is not None
    return cast("list[PromptRow]", read_shards(step.record.inputs["prompts"].path, "prompts").to_pylist())


def _pass(outcome: Outcome, iteration: int, store: Store) -> Pass:
    """Log-probs under an iteration's policy, as the evaluate stage computes and stores them."""
    record, config = _evaluation(outcome, iteration).record, outcome.variant.config.evaluation
    assert record is not None
    return Pass(store.root, record.inputs["policy"], config.dtype, config.runtime.device, config.runtime.batch_tokens)


def _text_logps(field: str, outcome: Outcome, iteration: int, store: Store) -> dict[str, np.ndarray]:
    """Log-probs per token of the given held-out texts under the policy, as the evaluate stage has stored them."""
    step = _evaluation(outcome, iteration)
    assert step.record is not None
    inputs, config = step.record.inputs, outcome.variant.config.evaluation_of_policies()
    answers = cast("list[GenerationRow]", read_shards(inputs["generations"].path, "generations").to_pylist())
    prompt_ids = {row["prompt_id"]: row["prompt_ids"] for row in answers}
    turns = Turns(inputs["policy"].path, config)
    texts = {row["prompt_id"]: turns.response(text) for row in _prompts(step) if (text := row[field])}
    before, after = [prompt_ids[name] for name in texts], list(texts.values())
    policy = _pass(outcome, iteration, store)
    policy.fill(before, after)
    return dict(zip(texts, policy.get(before, after), strict=True))


def _directory(outcome: Outcome, stage: str, store: Store) -> Path:
    """What a stage made for the last iteration's own training."""
    made = [step for step in outcome.steps if step.stage == stage and step.place.purpose is Purpose.TRAINING]
    record = made[-1].record
    assert record is not None
    return store.directory(record.kind, record.key)


def _curve(outcome: Outcome, store: Store) -> list[dict[str, float]]:
    """The training steps of the last iteration."""
    lines = (_directory(outcome, "train", store) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- from values to a verdict ---


def results_of(comparison: Comparison, outcomes: list[Outcome], store: Store) -> list[Result]:
    """What came of each claim of a finished comparison."""
    return [_result(claim, outcomes, store) for claim in comparison.config.claims]


def _result(claim: Claim, outcomes: list[Outcome], store: Store) -> Result:
    measure = MEASURES[claim.measure].values
    values = {}
    for name in claim.order:
        variant = outcomes[0].variant.name if name == START else name
        group = [outcome for outcome in outcomes if outcome.variant.name == variant]
        iteration = 0 if name == START else -1
        values[name] = _matrix([measure(outcome, iteration, store) for outcome in group])
    differences = [Difference(a, b, difference(values[a], values[b])) for a, b in _pairs(claim)]
    means = {name: float(matrix.mean()) for name, matrix in values.items()}
    return Result(claim, means, differences, verdict([item.interval for item in differences], claim.equal_within))


def _pairs(claim: Claim) -> Iterator[tuple[str, str]]:
    if claim.equal_within is None:
        return pairwise(claim.order)
    return ((claim.order[0], other) for other in claim.order[1:])


def _matrix(by_seed: list[Mapping[str, float]] | list[Values]) -> np.ndarray:
    """[S, P], prompts that every seed has. Raises: ConfigError where there is none."""
    names = sorted(set.intersection(*(set(values) for values in by_seed)))
    if not names:
        raise ConfigError("a claim's measure has no value: no prompt was scored with every seed")
    return np.array([[values[name] for name in names] for values in by_seed], dtype=np.float64)


def difference(above: np.ndarray, below: np.ndarray) -> Interval:
    """The mean of above - below, both [S, P], with its 95 % interval over seeds and prompts.

    One column: Student's interval over the seeds. Else a crossed bootstrap: seeds and prompts are drawn with
    replacement, independently of each other.

    >>> [round(float(value), 2) for value in difference(np.array([[3.0], [2.0], [4.0]]), np.ones((3, 1)))]
    [2.0, -0.48, 4.48, 0.58]
    """
    values = above - below
    seeds, prompts = values.shape
    if prompts == 1:
        return _student(values[:, 0])
    generator = np.random.default_rng(0)
    rows = generator.integers(0, seeds, size=(DRAWS, seeds))
    columns = generator.integers(0, prompts, size=(DRAWS, prompts))
    means = np.array([values[row].mean(axis=0)[column].mean() for row, column in zip(rows, columns, strict=True)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), float(means.std(ddof=1)))


def _student(values: np.ndarray) -> Interval:
    if len(values) == 1:
        return Interval(float(values[0]), float("nan"), float("nan"), float("nan"))
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    reach = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * error
    mean = float(values.mean())
    return Interval(mean, mean - reach, mean + reach, error)


def verdict(intervals: list[Interval], equal_within: float | None = None) -> Verdict:
    """Whether the differences are as claimed; an unknown interval decides nothing.

    >>> above, unsure = Interval(0.2, 0.1, 0.3, 0.05), Interval(0.1, -0.1, 0.3, 0.1)
    >>> verdict([above, above]), verdict([above, unsure]), verdict([unsure, Interval(-0.2, -0.3, -0.1, 0.05)])
    ('as claimed', 'not decided', 'against')
    >>> verdict([unsure], equal_within=0.5), verdict([unsure], equal_within=0.2), verdict([above], equal_within=0.05)
    ('as claimed', 'not decided', 'against')
    """
    margin = 0.0 if equal_within is None else equal_within
    if equal_within is None:
        against = any(item.high < 0 for item in intervals)
        claimed = all(item.low > 0 for item in intervals)
    else:
        against = any(item.high < -margin or item.low > margin for item in intervals)
        claimed = all(-margin < item.low and item.high < margin for item in intervals)
    if against:
        return "against"
    if claimed:
        return "as claimed"
    return "not decided"


def claims_table(results: list[Result]) -> list[dict[str, str]]:
    """One row per claim, every cell a text; no figure without what was expected of it."""
    return [
        {
            "claim": result.claim.statement,
            "source": result.claim.source,
            "measure": MEASURES[result.claim.measure].words,
            "expected": expected(result.claim),
            "what came": "; ".join(
                f"{item.above} - {item.below} {item.interval.text()}" for item in result.differences
            ),
            "means": ", ".join(f"{name} {mean:.3f}" for name, mean in result.means.items()),
            "verdict": result.verdict,
        }
        for result in results
    ]


def expected(claim: Claim) -> str:
    """The claim's order in signs.

    >>> claim = {"source": "", "statement": "", "measure": "score", "order": ["a", "b", "c"]}
    >>> expected(Claim(**claim)), expected(Claim(**claim, equal_within=0.1))
    ('a > b > c', 'b, c within 0.1 of a')
    """
    if claim.equal_within is None:
        return " > ".join(claim.order)
    return f"{', '.join(claim.order[1:])} within {claim.equal_within:g} of {claim.order[0]}"
