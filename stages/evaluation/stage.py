"""Stage - policy + its held-out generations -> eval_report: score, length, fluency under the start model, and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError, TransientError
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from stages.evaluation import sandbox
from stages.evaluation.intervals import Interval, bootstrap
from stages.evaluation.judged import BENCHMARKS, AlpacaEval, ArenaHard, MTBench
from stages.evaluation.rouge import rouge_l
from stages.evaluation.rows import column_names, report_row
from stages.evaluation.win_rates import best_of_n
from stages.job import Job
from stages.models.logps import Pass
from stages.models.policy import load_causal_lm, pick_device, pin_threads
from stages.models.tokens import load_tokenizer
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scores, Services, compares, open_scorer, score_once, scorer_class
from stages.scoring.checks import repetition
from stages.stage import StageRuntime

LM_EVAL_SHARD = 1


class EvaluationRuntime(StageRuntime):
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward of the start model."""
    lm_eval_batch_size: int = Field(16, ge=1)
    lm_eval_backend: Literal["transformers", "vllm"] = "transformers"
    """What computes log-probs and completions for lm-eval. They agree to some 1e-6 nats in float32."""
    sandbox: bool = True
    """Code that the model wrote (`allow_code`) runs in namespaces of its own (stages/evaluation/sandbox.py), or not at all. False: limits, an empty
    environment and a process of its own are enough, because the machine holds nothing else and can be thrown away."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """More arguments of lm-eval's vLLM engine, e.g. {tensor_parallel_size: 2, gpu_memory_utilization: 0.8}."""


class LMEvalTask(BaseConfig):
    path: str
    """Directory with task.yaml (lm-eval's format) and its data files."""
    limit: int | None = Field(None, ge=1)
    """Only the first questions."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files, so that a changed question is a changed key."""


class LMEvalSuite(BaseConfig):
    """A published set of benchmarks; see stages/evaluation/suites.py."""

    name: Literal["open_llm_v1", "open_llm_v2", "tidpo"]
    data_root: str | None = None
    """Directory with clones of the tasks' datasets. None: the hub, which must then be reachable (HF_HUB_OFFLINE=0 in runtime.env)."""
    only: tuple[str, ...] = ()
    """Some of its tasks."""
    limit: int | None = Field(None, ge=1)
    """Only the first questions of each task: quick, and no published number."""
    allow_code: bool = False
    """Run code that the model wrote (HumanEval), in a sandbox: see runtime.sandbox."""
    digest: str = ""
    """Of the mirror, for whoever changes it in place: any text, part of the key."""

    @model_validator(mode="after")
    def _known(self) -> LMEvalSuite:
        from stages.evaluation.lm_eval import check_suite

        try:
            check_suite(self.name, self.only, self.allow_code)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class EvaluationConfig(BaseConfig):
    """How a policy is measured, on prompts that never train."""

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "suites": (),
        "best_of": (),
        "rouge_l": False,
    } | dict.fromkeys(BENCHMARKS)

    scorer: Annotated[Named, SCORERS]
    """Scores the held-out generations; without the floors of the training scorer."""
    lm_eval: tuple[LMEvalTask, ...] = ()
    """Local lm-eval tasks."""
    suites: tuple[LMEvalSuite, ...] = ()
    """Published benchmarks by name."""
    mt_bench: MTBench | None = None
    """Judged two-turn questions."""
    alpaca_eval: AlpacaEval | None = None
    """Judged against a baseline's answers, with and without length control."""
    arena_hard: ArenaHard | None = None
    """Judged against a baseline's answers in two games, with style control."""
    best_of: tuple[int, ...] = ()
    """Expected held-out score of the best of n answers, for each of these n; needs heldout_sampling.num_candidates >= n."""
    rouge_l: bool = False
    """ROUGE-L of the held-out answers against the prompts' `response` (distillation)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes."""
    runtime: EvaluationRuntime = EvaluationRuntime()

    @model_validator(mode="after")
    def _scores_one_answer(self) -> EvaluationConfig:
        if compares(self.scorer):
            raise ValueError(
                f"evaluation.scorer {self.scorer.name} as set only compares two answers and gives none of them a score: take one that does, and "
                "compare policies with it in `tournament`"
            )
        return self

    def heldout_only(self) -> EvaluationConfig:
        """Without the benchmarks: what one training's checkpoints are compared by."""
        return self.model_copy(
            update={"lm_eval": (), "suites": (), "best_of": (), "rouge_l": False} | dict.fromkeys(BENCHMARKS)
        )


Config = EvaluationConfig


def run(job: Job) -> None:
    config: EvaluationConfig = job.config
    pin_threads(None)
    device = pick_device(config.runtime.device)
    parts: dict[str, tuple[int, Callable[[], list[dict[str, Any]]]]] = {
        "heldout": (0, lambda: _heldout_report(job, device))
    }
    if config.lm_eval or config.suites:
        parts["lm_eval"] = (LM_EVAL_SHARD, lambda: _lm_eval_report(job, device))
    for name, benchmark in BENCHMARKS.items():
        if (settings := getattr(config, name)) is not None:
            parts[name] = (benchmark.shard, partial(benchmark.evaluate, job, settings, device))
    for done, (name, (shard, evaluate)) in enumerate(parts.items(), start=1):
        if not job.has_shard(shard, "eval_report", beside=("heldout",) if name == "heldout" else ()):
            with job.timed(name):
                job.write(shard, evaluate())
        job.progress(done, len(parts), "parts")
    rows = read_shards(job.out, "eval_report").to_pylist()
    for name, row in zip(column_names(rows), rows, strict=True):
        job.metrics[name] = row["value"]
        if row["metric"] == "failed_judgments" and row["value"]:
            job.log(
                f"{row['task']}: {row['value']:.0f} of {row['n']} judgments of {row['task_version']} failed; they are in no mean. "
                f"To ask again, remove {job.out} and run again: what was answered is remembered"
            )


def _heldout_report(job: Job, device: str) -> list[dict[str, Any]]:
    heldout = _heldout_rows(job, device)
    write_shard(shard_path(job.out, 0, "heldout"), to_table(heldout, "heldout"))
    return _rows_of(heldout, job.config.scorer) + _more_heldout_rows(job, heldout)


def _heldout_rows(job: Job, device: str) -> list[dict[str, Any]]:
    config: EvaluationConfig = job.config
    prompts = {row["prompt_id"]: row for row in read_shards(job.path("prompts"), "prompts").to_pylist()}
    rows = read_shards(job.path("generations"), "generations").to_pylist()
    if prompts.keys() != {row["prompt_id"] for row in rows}:
        raise ContractError(
            f"generations {job.inputs['generations'].key} are not of the held-out prompts {job.inputs['prompts'].key}"
        )
    start = Pass(job.store_root, job.inputs["start"], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    prompt_ids, response_ids = [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows]
    start.fill(prompt_ids, response_ids)
    start.account(job)
    means = [float(row.mean()) for row in start.get(prompt_ids, response_ids)]
    scorer_class(config.scorer).check_prompts(config.scorer, list(prompts.values()))
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(number)
    batch = [
        Candidates(prompts[name], [rows[i] for i in numbers], [means[i] for i in numbers])
        for name, numbers in groups.items()
    ]
    services = Services(
        job.store_root, config.runtime.batch_tokens, job.log, used=job.used, waiting=lambda: job.timed("waiting")
    )
    scorer = open_scorer(config.scorer, device, services)
    try:
        scores, _ = score_once(scorer, batch)
    except TransientError as error:  # a judge that is away: the rest of the report is worth having
        job.log(f"the held-out answers stay unscored: {error}")
        scores = [Scores(None, None, [])] * len(batch)
    finally:
        scorer.close()
    if any(result.preference_logits is not None for result in scores):  # a plug-in's
        raise ConfigError(f"evaluation.scorer {config.scorer.name} only compares two answers: use it in `tournament`")
    heldout = []
    for numbers, result in zip(groups.values(), scores, strict=True):
        for k, i in enumerate(numbers):
            value = None if result.scores is None or np.isnan(result.scores[k]) else float(result.scores[k])
            heldout.append(
                {
                    "prompt_id": rows[i]["prompt_id"],
                    "candidate": rows[i]["candidate"],
                    "completion": rows[i]["completion"],
                    "score": value,
                    "num_tokens": len(rows[i]["token_ids"]),
                    "finished": rows[i]["finish_reason"] == "stop",
                    "start_logp": means[i],
                }
            )
    return heldout


def per_prompt(heldout: list[dict[str, Any]], column: str) -> dict[str, float]:
    """Mean of a column over the candidates of each prompt; unscored ones left out."""
    values: dict[str, list[float]] = {}
    for row in heldout:
        if row[column] is not None:
            values.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {name: float(np.mean(group)) for name, group in values.items()}


def _rows_of(heldout: list[dict[str, Any]], scorer: Named) -> list[dict[str, Any]]:
    columns = {
        "score": "score",
        "num_tokens": "mean_tokens",
        "finished": "finished_rate",
        "start_logp": "start_logp",
        "repetition": "repetition",
    }
    heldout = [row | {"repetition": repetition(row["completion"])} for row in heldout]
    rows = []
    for column, metric in columns.items():
        values = per_prompt(heldout, column)
        if not values:
            continue
        interval = bootstrap([values[name] for name in sorted(values)])
        rows.append(
            {
                "suite": "heldout",
                "task": "heldout",
                "metric": metric,
                "value": interval.mean,
                "stderr": interval.stderr,
                "low": interval.low,
                "high": interval.high,
                "n": len(values),
                "n_shot": 0,
                "task_version": scorer.name,
            }
        )
    # A policy that answers everything with one good sentence scores well; this shows it.
    distinct = len({row["completion"] for row in heldout}) / len(heldout)
    rows.append(
        {
            "suite": "heldout",
            "task": "heldout",
            "metric": "distinct_rate",
            "value": distinct,
            "stderr": None,
            "low": None,
            "high": None,
            "n": len(heldout),
            "n_shot": 0,
            "task_version": "1",
        }
    )
    return rows


def _more_heldout_rows(job: Job, heldout: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the options `best_of` and `rouge_l` ask for; nothing without them."""
    config: EvaluationConfig = job.config
    found: dict[str, Interval] = {}
    counts: dict[str, int] = {}
    groups: dict[str, list[Any]] = {}
    for row in heldout:
        groups.setdefault(row["prompt_id"], []).append(row["score"])
    if config.best_of:
        if max(config.best_of) > min(map(len, groups.values())):
            raise ConfigError(
                f"evaluation.best_of = {list(config.best_of)} needs {max(config.best_of)} held-out answers per prompt, there are "
                f"{min(map(len, groups.values()))}: set heldout_sampling.num_candidates"
            )
        for n, interval in best_of_n(groups, config.best_of).items():
            found[f"best_of_{n}"] = interval
            counts[f"best_of_{n}"] = sum(sum(score is not None for score in scores) >= n for scores in groups.values())
    if config.rouge_l:
        references = {
            row["prompt_id"]: row["response"] for row in read_shards(job.path("prompts"), "prompts").to_pylist()
        }
        rows = [
            row | {"rouge_l": rouge_l(row["completion"], references[row["prompt_id"]])}
            for row in heldout
            if references[row["prompt_id"]]
        ]
        if not rows:
            raise ConfigError(
                "evaluation.rouge_l compares with the held-out prompts' `response`, and none of them has one"
            )
        values = per_prompt(rows, "rouge_l")
        found["rouge_l"], counts["rouge_l"] = bootstrap([values[name] for name in sorted(values)]), len(values)
    return [
        report_row(
            "heldout", "heldout", metric, one.mean, counts[metric], one.stderr, one.low, one.high, config.scorer.name
        )
        for metric, one in found.items()
    ]


def check_sandbox(config: EvaluationConfig) -> None:
    """If code that the model wrote will be run, then it can be, safely, on this machine. Raises: ConfigError."""
    from stages.evaluation.lm_eval import check_suite

    if any(
        member.unsafe for suite in config.suites for member in check_suite(suite.name, suite.only, suite.allow_code)
    ):
        sandbox.check(config.runtime.sandbox)


def _lm_eval_report(job: Job, device: str) -> list[dict[str, Any]]:
    from stages.evaluation.lm_eval import (
        check_packages,
        check_suite,
        evaluate_suite,
        evaluate_tasks,
        load_task,
        open_transformers,
        open_vllm,
    )

    config: EvaluationConfig = job.config
    for suite in config.suites:
        check_packages(suite.name, check_suite(suite.name, suite.only, suite.allow_code))
    check_sandbox(config)
    directory = job.path("policy")
    if config.runtime.lm_eval_backend == "vllm":
        lm = open_vllm(str(directory), config.dtype, device, config.runtime.vllm)
    else:
        policy = load_causal_lm(str(directory), config.dtype, device).eval()
        lm = open_transformers(policy, load_tokenizer(directory), config.runtime.lm_eval_batch_size)
    rows = []
    for task in config.lm_eval:
        rows += evaluate_tasks(lm, [load_task(task.path)], task.limit)
    for suite in config.suites:
        rows += evaluate_suite(
            lm, suite.name, suite.data_root, suite.limit, suite.only, suite.allow_code, config.runtime.sandbox
        )
    return rows
