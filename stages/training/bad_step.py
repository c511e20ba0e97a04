"""Stages - a training step with wrong numbers: how it is recognised, and the files to run it again from (replay.py).

    <artifact>/.failed/step-000012/batch.json            settings, inputs, step, metrics
    <artifact>/.failed/step-000012/part-00000.parquet    the rows of the step
    <artifact>/.failed/step-000012/resume/               the checkpoint that the try resumed from, if any (hard links)

A step is wrong if its loss, gradient norm or any other metric is not finite, or if the log-probs explode (`MOST_NATS`
per token): then training stops, and nothing is signed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.errors import ContractError
from data_contracts.files import write_atomic
from data_contracts.shard_rows import ShardRows
from data_contracts.shards import shard_path, to_table, write_shard

if TYPE_CHECKING:
    from stages.training.batches import OptimizerStep
    from stages.training.config import TrainingConfig, TrainingInputs

BATCH = "batch.json"
MOST_NATS = 50.0
"""Mean negative log-prob of a token. A guess among 250,000 tokens is 12.4; beyond 50 a model is broken."""


class BadStep(Exception):
    """A step whose numbers are wrong, before it is written down."""

    def __init__(self, problem: str, step: OptimizerStep, metrics: dict[str, float], resumed_from: int):
        """`resumed_from`: the number of steps that were done when this try began."""
        super().__init__(problem)
        self.problem, self.step, self.metrics, self.resumed_from = problem, step, metrics, resumed_from


def what_is_wrong(metrics: dict[str, float], num_rows: int) -> str:
    """The problem in words; "" if there is none. `metrics` are means over the step's rows, `tokens` is their sum."""
    if bad := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        shown = {"loss": metrics.get("loss")} | bad
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None)
    summed = sum(metrics.get(f"logps/{side}", 0.0) for side in ("chosen", "rejected"))
    per_token = summed * num_rows / max(1.0, metrics.get("tokens", 1.0))
    if per_token < -MOST_NATS:
        return f"log-probs of {per_token:.0f} nats per token: the log-ratios explode"
    return ""


def save(bad: BadStep, out: Path, config: TrainingConfig, inputs: TrainingInputs, rows: ShardRows) -> ContractError:
    """Write the step's files; returns the error to raise, which names the rows and the command that runs them again."""
    batch_rows = rows.pick(bad.step.rows)
    names = [row["pair_id"] for row in batch_rows]
    directory = out / ".failed" / f"step-{bad.step.number + 1:06d}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_shard(shard_path(directory, 0), to_table(batch_rows, "weighted_pairs"))
    if bad.resumed_from and (out / "resume").is_dir():
        shutil.copytree(out / "resume", directory / "resume", copy_function=_link)
    batch = {
        "config": config.model_dump(mode="json"),
        "inputs": inputs._asdict(),
        "step": bad.step.number,
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in bad.metrics.items()},
        "pair_ids": names,
    }
    write_atomic(directory / BATCH, json.dumps(batch, indent=1))
    listed = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return ContractError(
        f"step {bad.step.number + 1}: {bad.problem}; its rows: {listed}. Nothing was signed. "
        f"`python -m stages.training.replay {directory}` runs it again, row by row; "
        "a lower training.learning_rate is the usual cure"
    )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
