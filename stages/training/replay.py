"""python -m stages.training.replay PATH: run a training step again whose numbers went wrong, row by row.

PATH is the directory that the stopped training named (bad_step.py says what lies in it). Exit codes: 0 the step goes wrong again, 1 it does not, 2 PATH holds no such batch.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from data_contracts.errors import ConfigError, PipelineError, print_error
from data_contracts.shards import ShardRows
from stages.training.bad_step import BATCH, what_is_wrong


def replay_batch(path: Path | str) -> bool:
    """Run the step again from where its try had begun, and print what every row does. Whether it goes wrong again.

    Raises: ConfigError for a directory that holds no batch.
    """
    directory = Path(path)
    try:
        batch = json.loads((directory / BATCH).read_text())
        failed, wanted, inputs = batch["step"], batch["metrics"], batch["inputs"]
        rows = ShardRows([inputs[name] for name in ("pairs", "more_pairs") if inputs.get(name)], "weighted_pairs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory} holds no batch to replay ({type(error).__name__}: {error}): give a directory .failed/step-..."
        ) from None
    from stages.models.policy import pick_device
    from stages.stage import STAGES
    from stages.training.batches import plan_steps
    from stages.training.engine import Engine
    from stages.training.loop import one_step
    from stages.training.streams import Streams

    config = STAGES["train"].parse(batch["config"])
    ranks = config.runtime.num_processes
    if ranks > 1:  # one process trains the same steps; a checkpoint of several cannot be loaded by one
        config = config.model_copy(
            update={"runtime": config.runtime.model_copy(update={"num_processes": 1, "zero_stage": 0})}
        )
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
    print(
        f"then: {wanted}\nnow:  {metrics}\n" + (f"wrong again: {wrong}" if wrong else "it did not go wrong this time")
    )
    return bool(wrong)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m stages.training.replay ARTIFACT/.failed/step-000012", file=sys.stderr)
        return ConfigError.exit_code
    try:
        return 0 if replay_batch(arguments[0]) else 1
    except PipelineError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
