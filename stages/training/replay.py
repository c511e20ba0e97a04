"""python -m stages.training.replay PATH: run a training step again whose numbers went wrong, row by row.

    <artifact>/.failed/step-000012/batch.json        settings, inputs, step, what was measured
    <artifact>/.failed/step-000012/part-00000.parquet    the rows of the step
    <artifact>/.failed/step-000012/resume/           the checkpoint that the try had gone on from, if any (hard links)

A step is wrong if its loss, gradient norm or any other metric is not finite, or if the log-probs explode (`MOST_NATS` per token): then
training stops, and nothing is signed. Exit codes: 0 the step goes wrong again, 1 it does not, 2 PATH holds no such batch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, ContractError, PipelineError, reported
from data_contracts.shards import Rows, shard_path, to_table, write_shard
from data_contracts.store import write_atomic

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


def save(bad: BadStep, out: Path, config: Any, inputs: dict[str, str | None], rows: Rows) -> ContractError:
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
    batch = {"config": config.model_dump(mode="json"), "inputs": inputs, "step": bad.step.number, "metrics": metrics, "pair_ids": names}
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


def replay_batch(path: Path | str) -> bool:
    """Run the step again from where its try had begun, and print what every row does. Whether it goes wrong again.

    Raises: ConfigError for a directory that holds no batch.
    """
    directory = Path(path)
    try:
        batch = json.loads((directory / BATCH).read_text())
        failed, wanted, inputs = batch["step"], batch["metrics"], batch["inputs"]
        rows = Rows([inputs[name] for name in ("pairs", "more_pairs") if inputs.get(name)], "weighted_pairs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory} holds no batch to replay ({type(error).__name__}: {error}): give a directory .failed/step-..."
        ) from None
    from stages.policy import pick_device
    from stages.stage import STAGES
    from stages.training.batches import plan_steps
    from stages.training.engine import Engine
    from stages.training.loop import one_step
    from stages.training.streams import Streams

    config = STAGES["train"].parse(batch["config"])
    ranks = config.runtime.num_processes
    if ranks > 1:  # one process trains the same steps; a checkpoint of several cannot be loaded by one
        config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"num_processes": 1, "zero_stage": 0})})
    steps = plan_steps(len(rows), config.batch_size, config.epochs, config.seed)
    engine = Engine(config, inputs["policy"], len(steps), pick_device(config.runtime.device))
    streams = Streams(config, engine, inputs["reference"], inputs["teacher"])
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        if ranks == 1 and (directory / "resume").is_dir():
            shutil.copytree(directory / "resume", Path(scratch) / "resume")
        done = engine.resume(Path(scratch) / "resume")
    wrong, metrics = "", {}
    for step in steps[done : failed + 1]:
        batch_rows = rows.pick(step.rows)
        if step.number == failed:
            streams.sample_anchors(batch_rows, step.number)
            print(f"step {failed + 1}, from a policy after {failed} steps; the loss of each row:")
            for number, row in enumerate(batch_rows):
                partner = batch_rows[(number + 1) % len(batch_rows)]
                result, _ = streams.loss([row], [partner], streams.step_values([row], [partner]))
                print(f"  {row['pair_id']}: {float(result.share(1, streams.token_count([row])).detach()):.6g}")
        metrics = one_step(engine, streams, config, step, batch_rows)
        wrong = what_is_wrong(metrics, len(batch_rows))
        if wrong and step.number < failed:
            print(f"step {step.number + 1} goes wrong already: {wrong}")
            return True
    print(f"then: {wanted}\nnow:  {metrics}\n" + (f"wrong again: {wrong}" if wrong else "it did not go wrong this time"))
    return bool(wrong)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m stages.training.replay ARTIFACT/.failed/step-000012", file=sys.stderr)
        return ConfigError.exit_code
    try:
        return 0 if replay_batch(arguments[0]) else 1
    except PipelineError as error:
        return reported(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
