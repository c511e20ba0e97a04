"""Stages - the held-out part of the evaluate stage: the score, length and fluency of each answer, and their means.

Answers of one prompt are not independent, so every mean and interval is over prompts (`per_prompt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow, HeldoutRow, ReportRow
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from stages.evaluation.intervals import bootstrap
from stages.evaluation.rouge import rouge_l
from stages.evaluation.rows import interval_row, report_row
from stages.evaluation.win_rates import best_of_n
from stages.job import Job
from stages.models.logps import Pass
from stages.scoring.base import Candidates, Scores, Services, open_scorer, score_once, scorer_class
from stages.scoring.checks import repetition

if TYPE_CHECKING:
    from stages.evaluation.stage import EvaluationConfig

METRICS = {
    "score": "score",
    "num_tokens": "mean_tokens",
    "finished": "finished_rate",
    "start_logp": "start_logp",
    "repetition": "repetition",
}
"""Column of `heldout` -> metric of eval_report."""


def evaluate_heldout(job: Job, device: str) -> list[ReportRow]:
    """Write the table `heldout`, one row per answer; return its means as rows of eval_report."""
    config: EvaluationConfig = job.config
    prompts = cast(list[PromptRow], read_shards(job.path("prompts"), "prompts").to_pylist())
    heldout = _heldout_rows(job, config, prompts, device)
    write_shard(shard_path(job.out, 0, "heldout"), to_table(heldout, "heldout"))
    rows = _means(heldout, config.scorer.name)
    if config.best_of:
        rows += _best_of(heldout, config)
    if config.rouge_l:
        rows.append(_rouge_l(heldout, prompts, config.scorer.name))
    return rows


def per_prompt(heldout: Sequence[Mapping[str, Any]], column: str) -> dict[str, float]:
    """prompt_id -> mean of a column over the prompt's answers; answers without a value are left out."""
    values: dict[str, list[float]] = {}
    for row in heldout:
        if row[column] is not None:
            values.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {prompt_id: float(np.mean(group)) for prompt_id, group in values.items()}


def _heldout_rows(job: Job, config: EvaluationConfig, prompts: Sequence[PromptRow], device: str) -> list[HeldoutRow]:
    """Rows of `heldout`: the answers of each prompt together, in the order of its first answer."""
    generations = cast(list[GenerationRow], read_shards(job.path("generations"), "generations").to_pylist())
    if {row["prompt_id"] for row in prompts} != {row["prompt_id"] for row in generations}:
        raise ContractError(
            f"generations {job.inputs['generations'].key} are not of the held-out prompts {job.inputs['prompts'].key}"
        )
    start_logps = _start_logps(job, config, generations)
    numbers: dict[str, list[int]] = {}
    for number, row in enumerate(generations):
        numbers.setdefault(row["prompt_id"], []).append(number)
    prompt_of = {row["prompt_id"]: row for row in prompts}
    batch = [
        Candidates(prompt_of[prompt_id], [generations[i] for i in group], [start_logps[i] for i in group])
        for prompt_id, group in numbers.items()
    ]
    heldout: list[HeldoutRow] = []
    for group, result in zip(numbers.values(), _scores(job, config, prompts, batch, device), strict=True):
        for k, i in enumerate(group):
            row = generations[i]
            score = None
            if result.scores is not None and not np.isnan(result.scores[k]):
                score = float(result.scores[k])
            heldout.append(
                {
                    "prompt_id": row["prompt_id"],
                    "candidate": row["candidate"],
                    "completion": row["completion"],
                    "score": score,
                    "num_tokens": len(row["token_ids"]),
                    "finished": row["finish_reason"] == "stop",
                    "start_logp": start_logps[i],
                }
            )
    return heldout


def _start_logps(job: Job, config: EvaluationConfig, generations: Sequence[GenerationRow]) -> list[float]:
    """Mean log-prob per token of each answer under the start model, in nats."""
    start = Pass(job.store_root, job.inputs["start"], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    prompt_ids = [row["prompt_ids"] for row in generations]
    response_ids = [row["token_ids"] for row in generations]
    start.fill(prompt_ids, response_ids)
    start.account(job)
    start.release()
    return [float(row.mean()) for row in start.get(prompt_ids, response_ids)]


def _scores(
    job: Job, config: EvaluationConfig, prompts: Sequence[PromptRow], batch: Sequence[Candidates], device: str
) -> Sequence[Scores]:
    """The scores of each prompt's answers.

    Raises: ConfigError for a scorer that only compares answers, TransientError for a judge that does not answer.
    """
    scorer_class(config.scorer).check_prompts(config.scorer, prompts)
    services = Services(
        job.store_root, config.runtime.batch_tokens, job.log, used=job.used, waiting=lambda: job.timed("waiting")
    )
    scorer = open_scorer(config.scorer, device, services)
    try:
        scores, _ = score_once(scorer, batch)
    finally:
        scorer.close()
    # The settings refuse our own scorers that only compare; this one came from another package.
    if any(result.preference_logits is not None for result in scores):
        raise ConfigError(f"evaluation.scorer {config.scorer.name} only compares two answers: use it in `tournament`")
    return scores


def _means(heldout: Sequence[HeldoutRow], scorer: str) -> list[ReportRow]:
    """Rows of eval_report for METRICS, and the rate of distinct answers."""
    answers = [row | {"repetition": repetition(row["completion"])} for row in heldout]
    rows = []
    for column, metric in METRICS.items():
        if values := per_prompt(answers, column):
            rows.append(_mean_row(metric, values, scorer))
    # A policy that answers everything with one good sentence scores well; this number shows it.
    distinct = len({row["completion"] for row in answers}) / len(answers)
    return [*rows, report_row("heldout", "heldout", "distinct_rate", distinct, len(answers))]


def _mean_row(metric: str, values: Mapping[str, float], scorer: str) -> ReportRow:
    """The mean over prompts of prompt_id -> value, with its interval."""
    interval = bootstrap([values[prompt_id] for prompt_id in sorted(values)])
    return interval_row("heldout", "heldout", metric, interval, len(values), scorer)


def _best_of(heldout: Sequence[HeldoutRow], config: EvaluationConfig) -> list[ReportRow]:
    """Rows with the expected score of the best of n answers, for each n. Raises: ConfigError for too few answers."""
    scores: dict[str, list[float | None]] = {}
    for row in heldout:
        scores.setdefault(row["prompt_id"], []).append(row["score"])
    fewest = min(map(len, scores.values()))
    if max(config.best_of) > fewest:
        raise ConfigError(
            f"evaluation.best_of = {list(config.best_of)} needs {max(config.best_of)} held-out answers per prompt, "
            f"there are {fewest}: set heldout_sampling.num_candidates"
        )
    rows = []
    for n, interval in best_of_n(scores, config.best_of).items():
        count = sum(sum(score is not None for score in group) >= n for group in scores.values())
        rows.append(interval_row("heldout", "heldout", f"best_of_{n}", interval, count, config.scorer.name))
    return rows


def _rouge_l(heldout: Sequence[HeldoutRow], prompts: Sequence[PromptRow], scorer: str) -> ReportRow:
    """ROUGE-L against the prompts' responses. Raises: ConfigError if no prompt has one."""
    references = {row["prompt_id"]: row["response"] for row in prompts if row["response"]}
    rows = [
        row | {"rouge_l": rouge_l(row["completion"], references[row["prompt_id"]])}
        for row in heldout
        if row["prompt_id"] in references
    ]
    if not rows:
        raise ConfigError("evaluation.rouge_l compares with the held-out prompts' `response`, and none of them has one")
    return _mean_row("rouge_l", per_prompt(rows, "rouge_l"), scorer)
