"""Stage - prompts + generations -> scored_pairs: score every candidate, keep the raw scores, derive one pair per prompt."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.artifact import RECORD, ArtifactRecord
from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from stages.policy import load_causal_lm, pick_device, pin_threads, score_responses
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Scores
from stages.scoring.pairing import best_vs_worst
from stages.stage import Job, StageRuntime
from stages.tokens import encode_response, load_tokenizer


class ScoringRuntime(StageRuntime):
    prompts_per_shard: int = Field(256, ge=1)
    """How much is lost, at most, when a scorer is killed."""
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward of the start model."""


class ScoringConfig(BaseConfig):
    """What is preferred over what."""

    scorer: SCORERS.field()
    """checks (verifiable instructions), length (tests), or a plug-in."""
    pairing: Literal["best_vs_worst", "truth_vs_generation"] | None = None
    """best_vs_worst: of the K candidates; truth_vs_generation: the prompt's `response` over candidate 0 (SPIN). None: what the method uses."""
    tau: float = Field(1.0, ge=0)
    """Scale of a pointwise score: P(i beats j) = sigmoid((r_i - r_j) / tau); 0: the better one wins for sure."""
    max_drop_rate: float = Field(0.9, ge=0, le=1)
    """Stop if more than this part of the prompts gives no pair."""
    runtime: ScoringRuntime = ScoringRuntime()


Config = ScoringConfig


def run(job: Job) -> None:
    config: ScoringConfig = job.config
    prompts = read_shards(job.path("prompts"), "prompts").to_pylist()
    groups: dict[str, list[dict[str, Any]]] = {prompt["prompt_id"]: [] for prompt in prompts}
    for row in read_shards(job.path("generations"), "generations").to_pylist():
        if row["prompt_id"] not in groups:
            raise ContractError(f"generations {job.inputs['generations'].key}: prompt {row['prompt_id']!r} is not in prompts {job.inputs['prompts'].key}")
        groups[row["prompt_id"]].append(row)
    if empty := [prompt_id for prompt_id, rows in groups.items() if not rows]:
        raise ContractError(f"generations {job.inputs['generations'].key}: no candidate for the prompt(s) {empty[:3]}")
    scorer_class = SCORERS.get(config.scorer.name)
    scorer_class.check_prompts(config.scorer, prompts)
    truths = _truths(job, prompts) if config.pairing == "truth_vs_generation" else None
    scorer, start_logps = None, _StartLogps(job) if scorer_class.needs_start_logps(config.scorer) else None
    for index, chunk in job.missing_shards(prompts, config.runtime.prompts_per_shard, "scored_pairs"):
        if scorer is None:
            with job.timed("load"):
                scorer = scorer_class(config.scorer, pick_device(config.runtime.device) if start_logps else "cpu")
        with job.timed("busy"):
            generations = [groups[prompt["prompt_id"]] for prompt in chunk]
            means = start_logps.of(generations) if start_logps else [None] * len(chunk)
            batch = [Candidates(*item) for item in zip(chunk, generations, means, strict=True)]
            scores = scorer.score(batch)
        # Raw scores first: a shard of pairs without its scores cannot be left behind.
        write_shard(shard_path(job.out, index, "scores"), to_table([_score_row(item, score) for item, score in zip(batch, scores, strict=True)], "scores"))
        rows = [_pair_row(item, score, truths, config) for item, score in zip(batch, scores, strict=True)]
        dropped = [{"prompt_id": prompt["prompt_id"], "reason": row} for prompt, row in zip(chunk, rows, strict=True) if isinstance(row, str)]
        write_shard(shard_path(job.out, index, "dropped"), to_table(dropped, "dropped"))
        job.write(index, [row for row in rows if isinstance(row, dict)])
    _summarise(job, len(prompts))


class _StartLogps:
    """Mean log-prob per token under the start model: from the sampler where the policy is the start model, else by a pass of it."""

    def __init__(self, job: Job):
        if "start" not in job.inputs:
            raise ConfigError(f"the scorer {job.config.scorer.name} has a fluency floor and needs the start model: give the input `start`")
        sampled_by = ArtifactRecord.model_validate_json((job.path("generations") / RECORD).read_bytes()).inputs["policy"]
        self.job, self.model = job, None
        self.from_sampler = sampled_by.content == job.inputs["start"].content

    def of(self, groups: list[list[dict[str, Any]]]) -> list[list[float]]:
        rows = [row for group in groups for row in group]
        if self.from_sampler:
            means = iter([float(np.mean(row["token_logps"])) for row in rows])
        else:
            if self.model is None:
                pin_threads(None)
                self.model = load_causal_lm(str(self.job.path("start")), "bfloat16", pick_device(self.job.config.runtime.device)).eval()
            logps = score_responses(self.model, [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows], self.job.config.runtime.batch_tokens)
            means = iter([float(row.mean()) for row in logps])
        return [[next(means) for _ in group] for group in groups]


def _truths(job: Job, prompts: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Token ids of every ground truth."""
    if "policy" not in job.inputs:
        raise ConfigError("pairing truth_vs_generation tokenises the ground truths: give the input `policy`")
    if missing := [prompt["prompt_id"] for prompt in prompts if prompt["response"] is None]:
        raise ConfigError(f"pairing truth_vs_generation needs a `response` in every prompt; {len(missing)} have none, e.g. {missing[:3]}")
    tokenizer = load_tokenizer(job.path("policy"))
    return {prompt["prompt_id"]: encode_response(tokenizer, prompt["response"]) for prompt in prompts}


def _score_row(item: Candidates, scores: Scores) -> dict[str, Any]:
    plain = None if scores.scores is None else [None if np.isnan(value) else float(value) for value in scores.scores]
    logits = None if scores.preference_logits is None else scores.preference_logits.ravel().tolist()
    return {"prompt_id": item.prompt["prompt_id"], "scores": plain, "preference_logits": logits, "reasons": scores.reasons}


def _pair_row(item: Candidates, scores: Scores, truths: dict[str, list[int]] | None, config: ScoringConfig) -> dict[str, Any] | str:
    """A row of scored_pairs, or the reason why the prompt gives none."""
    prompt, rows = item.prompt, item.generations
    common = {"prompt_id": prompt["prompt_id"], "prompt_ids": rows[0]["prompt_ids"], "scorer": config.scorer.name}
    if truths is not None:
        truth = truths[prompt["prompt_id"]]
        if truth == rows[0]["token_ids"]:
            return "chosen and rejected are the same text"
        score = None if scores.scores is None else float(scores.scores[0])
        return common | {
            "pair_id": f"{prompt['prompt_id']}/truth-0",
            "chosen_ids": truth,
            "rejected_ids": rows[0]["token_ids"],
            "chosen": prompt["response"],
            "rejected": rows[0]["completion"],
            "score_chosen": None,
            "score_rejected": score,
            "win_rate_chosen": 1.0,
            "win_rate_rejected": 0.0,
        }
    pair = best_vs_worst(scores, rows, config.tau)
    if isinstance(pair, str):
        return pair
    chosen, rejected = rows[pair.chosen], rows[pair.rejected]
    return common | {
        "pair_id": f"{prompt['prompt_id']}/{pair.chosen}-{pair.rejected}",
        "chosen_ids": chosen["token_ids"],
        "rejected_ids": rejected["token_ids"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "score_chosen": None if scores.scores is None else float(scores.scores[pair.chosen]),
        "score_rejected": None if scores.scores is None else float(scores.scores[pair.rejected]),
        "win_rate_chosen": float(pair.win_rates[pair.chosen]),
        "win_rate_rejected": float(pair.win_rates[pair.rejected]),
    }


def _summarise(job: Job, num_prompts: int) -> None:
    pairs = read_shards(job.out, "scored_pairs")
    raw = read_shards(job.out, "scores", "scores")
    dropped = read_shards(job.out, "dropped", "dropped")
    values = [value for row in raw["scores"].to_pylist() if row is not None for value in row]
    scored = np.array([value for value in values if value is not None], dtype=float)
    drop_rate = 1 - pairs.num_rows / num_prompts
    reasons = Counter(reason for row in raw["reasons"].to_pylist() for reason in row if reason)
    job.metrics |= {"pairs": pairs.num_rows, "drop_rate": drop_rate, "unscored": len(values) - len(scored)}
    job.metrics |= {f"dropped/{reason}": count for reason, count in Counter(dropped["reason"].to_pylist()).items()}
    job.metrics |= {f"spoilt/{reason}": count for reason, count in reasons.items()}
    if len(scored):
        job.metrics["mean_score"] = float(scored.mean())
    if pairs.num_rows:
        for side in ("chosen", "rejected"):
            job.metrics[f"mean_tokens/{side}"] = float(pairs[f"{side}_ids"].combine_chunks().value_lengths().to_numpy().mean())
            job.metrics[f"win_rate/{side}"] = float(np.mean(pairs[f"win_rate_{side}"].to_numpy()))
    if drop_rate > job.config.max_drop_rate or not pairs.num_rows:
        raise ContractError(
            f"scored_pairs {Path(job.out).name}: {num_prompts - pairs.num_rows} of {num_prompts} prompts give no pair (limit {job.config.max_drop_rate:.0%}): "
            f"{dict(Counter(dropped['reason'].to_pylist()))}. More candidates or a higher temperature give more varied ones; scoring.max_drop_rate moves the limit"
        )
