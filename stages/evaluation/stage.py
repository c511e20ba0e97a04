"""Stage - policy + its held-out generations -> eval_report: score, length, fluency under the start model, and lm-eval tasks."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ContractError
from data_contracts.shards import read_shards, shard_is_whole, shard_path, to_table, write_shard
from stages.evaluation.gate import GateConfig
from stages.evaluation.intervals import bootstrap
from stages.logps import Pass
from stages.policy import load_causal_lm, pick_device, pin_threads
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.base import Candidates
from stages.scoring.checks import repetition
from stages.stage import Job, StageRuntime
from stages.tokens import load_tokenizer

LM_EVAL_SHARD = 1


class EvaluationRuntime(StageRuntime):
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward of the start model."""
    lm_eval_batch_size: int = Field(16, ge=1)


class LMEvalTask(BaseConfig):
    path: str
    """Directory with task.yaml (lm-eval's format) and its data files."""
    limit: int | None = Field(None, ge=1)
    """Only the first questions."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files, so that a changed question is a changed key."""


class EvaluationConfig(BaseConfig):
    """How a policy is measured, on prompts that never train."""

    scorer: SCORERS.field()
    """Scores the held-out generations; without the floors of the training scorer."""
    lm_eval: tuple[LMEvalTask, ...] = ()
    """Local lm-eval tasks."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes."""
    gate: GateConfig = GateConfig()
    """Whether a policy that is not better goes on. Decided by the flow; the stage does not read it."""
    runtime: EvaluationRuntime = EvaluationRuntime()


Config = EvaluationConfig


def run(job: Job) -> None:
    config: EvaluationConfig = job.config
    total = 1 + bool(config.lm_eval)
    pin_threads(None)
    device = pick_device(config.runtime.device)
    if not shard_is_whole(shard_path(job.out, 0), "eval_report"):
        with job.timed("heldout"):
            heldout = _heldout_rows(job, device)
        write_shard(shard_path(job.out, 0, "heldout"), to_table(heldout, "heldout"))
        job.write(0, _heldout_report(heldout, config.scorer))
    job.progress(1, total, "parts")
    if config.lm_eval and not shard_is_whole(shard_path(job.out, LM_EVAL_SHARD), "eval_report"):
        with job.timed("lm_eval"):
            job.write(LM_EVAL_SHARD, _lm_eval_report(job, device))
        job.progress(2, total, "parts")
    for row in read_shards(job.out, "eval_report").to_pylist():
        job.metrics[f"{row['task']}/{row['metric']}"] = row["value"]


def _heldout_rows(job: Job, device: str) -> list[dict[str, Any]]:
    config: EvaluationConfig = job.config
    prompts = {row["prompt_id"]: row for row in read_shards(job.path("prompts"), "prompts").to_pylist()}
    rows = read_shards(job.path("generations"), "generations").to_pylist()
    if prompts.keys() != {row["prompt_id"] for row in rows}:
        raise ContractError(f"generations {job.inputs['generations'].key} are not of the held-out prompts {job.inputs['prompts'].key}")
    start = Pass(job.store_root, job.inputs["start"], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    prompt_ids, response_ids = [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows]
    start.fill(prompt_ids, response_ids)
    means = [float(row.mean()) for row in start.get(prompt_ids, response_ids)]
    scorer_class = SCORERS.get(config.scorer.name)
    scorer_class.check_prompts(config.scorer, list(prompts.values()))
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(number)
    batch = [Candidates(prompts[name], [rows[i] for i in numbers], [means[i] for i in numbers]) for name, numbers in groups.items()]
    scores = scorer_class(config.scorer, device).score(batch)
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


def _heldout_report(heldout: list[dict[str, Any]], scorer: Named) -> list[dict[str, Any]]:
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


def _lm_eval_report(job: Job, device: str) -> list[dict[str, Any]]:
    from stages.evaluation.lm_eval import evaluate, load_task

    policy = load_causal_lm(str(job.path("policy")), job.config.dtype, device).eval()
    tokenizer = load_tokenizer(job.path("policy"))
    rows = []
    for task in job.config.lm_eval:
        rows += evaluate(policy, tokenizer, [load_task(task.path)], job.config.runtime.lm_eval_batch_size, task.limit)
    return rows
