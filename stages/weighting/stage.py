"""Stage - scored_pairs + reference -> weighted_pairs: reference log-probs and a weight for every token, one pair per row.

What the trainer needs is all in the row, so it loads one model and asks nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ContractError
from data_contracts.shards import read_shards
from stages.policy import load_causal_lm, pick_device, pin_threads, score_responses
from stages.stage import Job, StageRuntime

SIDES = ("chosen", "rejected")


class WeightingRuntime(StageRuntime):
    pairs_per_shard: int = Field(256, ge=1)
    """How much is lost, at most, when the stage is killed."""
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward."""


class WeightingConfig(BaseConfig):
    """Per-token reference log-probs, and weights of one."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the reference pass; the trainer's, or policy and reference differ before the first step."""
    runtime: WeightingRuntime = WeightingRuntime()


Config = WeightingConfig


def run(job: Job) -> None:
    config: WeightingConfig = job.config
    pairs = read_shards(job.path("pairs"), "scored_pairs").to_pylist()
    model: Any = None
    for index, chunk in job.missing_shards(pairs, config.runtime.pairs_per_shard, "weighted_pairs"):
        if model is None:
            with job.timed("load"):
                pin_threads(None)
                model = load_causal_lm(str(job.path("reference")), config.dtype, pick_device(config.runtime.device)).eval()
        with job.timed("busy"):
            prompts = [pair["prompt_ids"] for side in SIDES for pair in chunk]
            responses = [pair[f"{side}_ids"] for side in SIDES for pair in chunk]
            logps = score_responses(model, prompts, responses, config.runtime.batch_tokens)
        job.write(index, [_row(pair, logps[i], logps[len(chunk) + i]) for i, pair in enumerate(chunk)])
    table = read_shards(job.out, "weighted_pairs")
    job.metrics |= {"pairs": table.num_rows}
    for side in SIDES:
        values = table[f"{side}_reference_logps"].combine_chunks().flatten().to_numpy()
        job.metrics |= {f"tokens/{side}": len(values), f"mean_reference_logp/{side}": float(values.mean())}


def _row(pair: dict[str, Any], chosen_logps: np.ndarray, rejected_logps: np.ndarray) -> dict[str, Any]:
    row = {name: pair[name] for name in ("pair_id", "prompt_id", "prompt_ids", "chosen_ids", "rejected_ids", "win_rate_chosen", "win_rate_rejected")}
    for side, logps in zip(SIDES, (chosen_logps, rejected_logps), strict=True):
        if not len(pair[f"{side}_ids"]):
            raise ContractError(f"scored_pairs: pair {pair['pair_id']!r} has no token in {side}_ids")
        if not np.isfinite(logps).all():
            raise ContractError(f"pair {pair['pair_id']!r}: the reference log-probs of {side} hold NaN or infinity: the reference model's weights are damaged")
        row[f"{side}_reference_logps"] = logps
        row[f"{side}_weights"] = np.ones(len(logps), dtype=np.float32)
    return row
