"""Stages - the held-out part of the evaluate stage: the score, length and fluency of each answer, and their means.

Answers of one prompt are not independent, so every mean and interval is over prompts (`per_prompt`). Prompts and answers
are read a few thousand at a time: what is kept of all of them are numbers and columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow, HeldoutRow, ReportRow
from data_contracts.shard_rows import RowsByPrompt, ShardRows, prompt_hashes
from data_contracts.shards import shard_path, to_table, write_shard
from stages.evaluation.given import given_rows, has_given_texts
from stages.evaluation.intervals import bootstrap
from stages.evaluation.rows import interval_row, report_row
from stages.evaluation.win_rates import best_means
from stages.job import Job
from stages.models.logps import Pass
from stages.scoring.base import Candidates, Scorer, Scores, Services, open_scorer, score_once, scorer_class
from stages.scoring.checks import repetition
from stages.scoring.rouge import rouge_l

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
ROUGE_L = "rouge_l"
PROMPTS_AT_ONCE = 4096
"""Prompts whose answers are scored together and held as rows."""


def evaluate_heldout(job: Job, device: str) -> list[ReportRow]:
    """Write the table `heldout`, one row per answer; return its means as rows of eval_report."""
    config: EvaluationConfig = job.config
    answers = _Answers(job)
    start_logps = iter(_start_logps(job, config, answers))
    means = _Means(config)
    tables: list[pa.Table] = []
    scorer_class(config.scorer).check_prompts(config.scorer, cast("Sequence[PromptRow]", answers.prompts))
    scorer = open_scorer(config.scorer, device, _services(job, config))
    try:
        for prompts, groups in answers.batches():
            rows = _heldout_rows(scorer, prompts, groups, start_logps)
            means.add(rows, prompts)
            tables.append(to_table(rows, "heldout"))
    finally:
        scorer.close()
    heldout = pa.concat_tables(tables)
    write_shard(shard_path(job.out, 0, "heldout"), heldout)
    # A policy that answers everything with one good sentence scores well; the rate of distinct answers shows it.
    distinct = pc.count_distinct(heldout.column("completion")).as_py() / heldout.num_rows
    return [
        *means.rows(),
        report_row("heldout", "heldout", "distinct_rate", distinct, heldout.num_rows),
        *means.best_of_rows(),
        *means.rouge_rows(),
        *(given_rows(job, answers.batches()) if has_given_texts(job.path("prompts")) else ()),
    ]


def per_prompt(heldout: Sequence[Mapping[str, Any]], column: str) -> dict[str, float]:
    """prompt_id -> mean of a column over the prompt's answers; answers without a value are left out."""
    values: dict[str, list[float]] = {}
    for row in heldout:
        if row[column] is not None:
            values.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {prompt_id: float(np.mean(group)) for prompt_id, group in values.items()}


class _Answers:
    """The held-out prompts and their answers: the answers of a prompt together, in the order of its first answer."""

    def __init__(self, job: Job):
        """Raises: ContractError for answers that are not of the held-out prompts, or a prompt without an answer."""
        self.prompts = ShardRows([job.path("prompts")], "prompts")
        hashes = prompt_hashes(self.prompts)
        self.rows = RowsByPrompt(ShardRows([job.path("generations")], "generations"))
        if not self.rows.counts(hashes).all() or self.rows.first_of_others(hashes) is not None:
            raise ContractError(
                f"generations {job.inputs['generations'].key} are not of the held-out prompts {job.inputs['prompts'].key}"
            )
        self.order = np.argsort(self.rows.first_numbers(hashes), kind="stable")
        """Numbers of the prompts."""

    def batches(self) -> Iterator[tuple[list[PromptRow], list[list[GenerationRow]]]]:
        """Yield some prompts and the answers of each, until all were yielded."""
        for first in range(0, len(self.order), PROMPTS_AT_ONCE):
            prompts = cast("list[PromptRow]", self.prompts.pick(self.order[first : first + PROMPTS_AT_ONCE]))
            answers = self.rows.pick([prompt["prompt_id"] for prompt in prompts])
            yield prompts, cast("list[list[GenerationRow]]", answers)


def _start_logps(job: Job, config: EvaluationConfig, answers: _Answers) -> Sequence[float]:
    """Mean log-prob per token of each answer under the start model, in nats, in the order of `answers.batches`.

    The model is gone from the device when this returns: the scorer may have one of its own.
    """
    start = Pass(job.store_root, job.inputs["start"], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    means = array("d")
    for _, groups in answers.batches():
        rows = [row for group in groups for row in group]
        prompt_ids = [row["prompt_ids"] for row in rows]
        response_ids = [row["token_ids"] for row in rows]
        start.fill(prompt_ids, response_ids)
        means.extend(float(row.mean()) for row in start.get(prompt_ids, response_ids))
    start.account(job)
    start.release()
    return means


def _services(job: Job, config: EvaluationConfig) -> Services:
    return Services(
        job.store_root, config.runtime.batch_tokens, job.log, used=job.used, waiting=lambda: job.timed("waiting")
    )


def _heldout_rows(
    scorer: Scorer,
    prompts: Sequence[PromptRow],
    groups: Sequence[list[GenerationRow]],
    start_logps: Iterator[float],
) -> list[HeldoutRow]:
    """Rows of `heldout` for the answers of these prompts.

    Raises: ConfigError for a scorer that only compares answers, TransientError for a judge that does not answer.
    """
    batch = [
        Candidates(prompt, group, [next(start_logps) for _ in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    scores, _ = score_once(scorer, batch)
    # The settings refuse our own scorers that only compare; this one came from another package.
    if any(result.preference_logits is not None for result in scores):
        raise ConfigError(f"evaluation.scorer {scorer.config.name} only compares two answers: use it in `tournament`")
    return [
        {
            "prompt_id": row["prompt_id"],
            "candidate": row["candidate"],
            "completion": row["completion"],
            "score": _point(result, k),
            "num_tokens": len(row["token_ids"]),
            "finished": row["finish_reason"] == "stop",
            "start_logp": logp,
        }
        for candidates, result in zip(batch, scores, strict=True)
        for k, (row, logp) in enumerate(zip(candidates.generations, candidates.start_logps or [], strict=True))
    ]


def _point(result: Scores, k: int) -> float | None:
    """The score of candidate k; None if it could not be scored."""
    if result.scores is None or np.isnan(result.scores[k]):
        return None
    return float(result.scores[k])


class _Means:
    """The mean of each prompt's answers for every metric, at 16 bytes each, from rows of `heldout` as they come."""

    def __init__(self, config: EvaluationConfig):
        self.config = config
        self.prompt_ids: list[pa.Array[Any]] = []
        self.num_prompts = 0
        self.numbers = {metric: array("q") for metric in (*METRICS.values(), ROUGE_L)}
        """Metric -> the prompts that have a mean."""
        self.values = {metric: array("d") for metric in self.numbers}
        self.best = {n: array("d") for n in config.best_of}
        """n -> the expected score of the best of n answers, of each prompt that has as many scores."""
        self.fewest_answers: int | None = None

    def add(self, heldout: Sequence[HeldoutRow], prompts: Sequence[PromptRow]) -> None:
        """Take in the answers of these prompts."""
        ids = [prompt["prompt_id"] for prompt in prompts]
        number_of = {prompt_id: self.num_prompts + number for number, prompt_id in enumerate(ids)}
        self.prompt_ids.append(pa.array(ids, pa.string()))
        self.num_prompts += len(ids)
        answers = [row | {"repetition": repetition(row["completion"])} for row in heldout]
        means = {metric: per_prompt(answers, column) for column, metric in METRICS.items()}
        if self.config.rouge_l:
            references = {prompt["prompt_id"]: prompt["response"] for prompt in prompts if prompt["response"]}
            means[ROUGE_L] = per_prompt(_with_rouge_l(heldout, references), "rouge_l")
        for metric, values in means.items():
            self.numbers[metric].extend(number_of[prompt_id] for prompt_id in values)
            self.values[metric].extend(values.values())
        scores: dict[str, list[float | None]] = {}
        for row in heldout:
            scores.setdefault(row["prompt_id"], []).append(row["score"])
        fewest = min(map(len, scores.values()))
        self.fewest_answers = fewest if self.fewest_answers is None else min(fewest, self.fewest_answers)
        for n, best in self.best.items():
            best.extend(best_means(scores.values(), n))

    def rows(self) -> list[ReportRow]:
        """Rows of eval_report for METRICS: the mean over prompts, in the order of their ids, with its interval."""
        return [self._row(metric) for metric in METRICS.values() if self.values[metric]]

    def best_of_rows(self) -> list[ReportRow]:
        """Rows with the expected score of the best of n answers, for each n. Raises: ConfigError for too few answers."""
        if self.best and self.fewest_answers is not None and max(self.best) > self.fewest_answers:
            raise ConfigError(
                f"evaluation.best_of = {list(self.best)} needs {max(self.best)} held-out answers per prompt, "
                f"there are {self.fewest_answers}: set heldout_sampling.num_candidates"
            )
        scorer = self.config.scorer.name
        return [
            interval_row("heldout", "heldout", f"best_of_{n}", bootstrap(best), len(best), scorer)
            for n, best in self.best.items()
            if best
        ]

    def rouge_rows(self) -> list[ReportRow]:
        """ROUGE-L against the prompts' responses, if the settings ask for it. Raises: ConfigError if no prompt has one."""
        if not self.config.rouge_l:
            return []
        if not self.values[ROUGE_L]:
            raise ConfigError(
                "evaluation.rouge_l compares with the held-out prompts' `response`, and none of them has one"
            )
        return [self._row(ROUGE_L)]

    def _row(self, metric: str) -> ReportRow:
        by_id = np.empty(self.num_prompts, np.int64)
        by_id[pc.sort_indices(pa.chunked_array(self.prompt_ids)).to_numpy()] = np.arange(self.num_prompts)
        order = np.argsort(by_id[np.frombuffer(self.numbers[metric], np.int64)])
        interval = bootstrap(np.frombuffer(self.values[metric])[order])
        return interval_row("heldout", "heldout", metric, interval, len(order), self.config.scorer.name)


def _with_rouge_l(heldout: Sequence[HeldoutRow], references: Mapping[str, str]) -> list[dict[str, Any]]:
    """The answers to prompts that have a response, with their ROUGE-L against it."""
    return [
        {**row, "rouge_l": rouge_l(row["completion"], references[row["prompt_id"]])}
        for row in heldout
        if row["prompt_id"] in references
    ]
