"""Stages - a training step whose numbers went wrong: what is wrong with it, and the files from which it can be run again (replay.py).

    <artifact>/.failed/step-000012/batch.json            settings, inputs, step, metrics
    <artifact>/.failed/step-000012/part-00000.parquet    the rows of the step
    <artifact>/.failed/step-000012/resume/               the checkpoint that the try had gone on from, if any (hard links)

A step is wrong if its loss, gradient norm or any other metric is not finite, or if the log-probs explode (`MOST_NATS` per token): then
training stops, and nothing is signed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from data_contracts.errors import ContractError
from data_contracts.files import write_atomic
from data_contracts.shards import ShardRows, shard_path, to_table, write_shard

BATCH = "batch.json"
MOST_NATS = 50.0
"""Mean negative log-prob of a token. A guess among 250,000 tokens is 12.4; beyond this a model is broken, and its log-ratios with it."""


class BadStep(Exception):
    """A step whose numbers are wrong, before anybody has written it down."""

    def __init__(self, wrong: str, step: Any, metrics: dict[str, float], done: int):
        super().__init__(wrong)
        self.wrong, self.step, self.metrics, self.done = wrong, step, metrics, done


def what_is_wrong(metrics: dict[str, float], num_rows: int) -> str:
    """In words; "" for nothing. `metrics` are means over the step's rows, but for `tokens`, its sum."""
    if bad := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        shown = {"loss": metrics.get("loss")} | bad
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None)
    summed = sum(metrics.get(f"logps/{side}", 0.0) for side in ("chosen", "rejected"))
    per_token = summed * num_rows / max(1.0, metrics.get("tokens", 1.0))
    return f"log-probs of {per_token:.0f} nats per token: the log-ratios explode" if per_token < -MOST_NATS else ""


def save(bad: BadStep, out: Path, config: Any, inputs: dict[str, str | None], rows: ShardRows) -> ContractError:
    """Write the batch down; the error to raise, which names its rows and the way to see it again."""
    batch_rows = rows.pick(bad.step.rows)
    names = [row["pair_id"] for row in batch_rows]
    directory = out / ".failed" / f"step-{bad.step.number + 1:06d}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_shard(shard_path(directory, 0), to_table(batch_rows, "weighted_pairs"))
    if bad.done and (out / "resume").is_dir():
        shutil.copytree(out / "resume", directory / "resume", copy_function=_link)
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in bad.metrics.items()}
    batch = {
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
        "step": bad.step.number,
        "metrics": metrics,
        "pair_ids": names,
    }
    write_atomic(directory / BATCH, json.dumps(batch, indent=1))
    return ContractError(
        f"step {bad.step.number + 1}: {bad.wrong}; its rows: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. Nothing was signed. "
        f"`python -m stages.training.replay {directory}` runs it again, row by row; a lower training.learning_rate is the usual cure"
    )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
