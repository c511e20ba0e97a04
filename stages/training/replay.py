"""python -m stages.training.replay PATH: run a training step with wrong numbers again, row by row.

PATH is the directory that the stopped training named (bad_step.py lists its files). Exit codes: 0 the step goes wrong
again, 1 it does not, 2 PATH holds no such step.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data_contracts.errors import ConfigError, PipelineError, print_error
from stages.training.bad_step import BATCH, what_is_wrong
from stages.training.config import TrainingConfig, TrainingInputs

if TYPE_CHECKING:
    from stages.training.batches import WeightedPair
    from stages.training.streams import Streams


def replay_batch(path: Path | str) -> bool:
    """Run the step again from where its try began, and print each row's loss; returns whether it goes wrong again.

    Raises: ConfigError for a directory that holds no step.
    """
    directory = Path(path)
    try:
        batch = json.loads((directory / BATCH).read_text())
        failed, recorded, inputs = batch["step"], batch["metrics"], TrainingInputs(**batch["inputs"])
        rows = inputs.rows()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory} holds no batch to replay ({type(error).__name__}: {error}): give a directory .failed/step-..."
        ) from None
    from stages.models.policy import pick_device
    from stages.training.batches import plan_steps
    from stages.training.engine import Engine
    from stages.training.loop import one_step
    from stages.training.streams import Streams

    config = TrainingConfig.model_validate(batch["config"])
    ranks = config.runtime.num_processes
    if ranks > 1:  # one process trains the same steps; it cannot load a checkpoint of several
        runtime = config.runtime.model_copy(update={"num_processes": 1, "zero_stage": 0})
        config = config.model_copy(update={"runtime": runtime})
    steps = plan_steps(len(rows), config.batch_size, config.epochs, config.seed)
    engine = Engine(config, inputs.policy, len(steps), pick_device(config.runtime.device), inputs.start)
    streams = Streams(config, engine, inputs.reference, inputs.teacher)
    with tempfile.TemporaryDirectory(prefix="replay-") as scratch:
        if ranks == 1 and (directory / "resume").is_dir():
            shutil.copytree(directory / "resume", Path(scratch) / "resume")
        first = engine.resume(Path(scratch) / "resume")
    problem, metrics = "", {}
    for step in steps[first : failed + 1]:
        batch_rows = rows.pick(step.rows)
        if step.number == failed:
            streams.sample_anchors(batch_rows, step.number)
            print(f"step {failed + 1}, from a policy after {failed} steps; the loss of each row:")
            _print_losses(streams, batch_rows)
        metrics, _ = one_step(engine, streams, config, step, batch_rows)
        problem = what_is_wrong(metrics, len(batch_rows))
        if problem and step.number < failed:
            print(f"step {step.number + 1} goes wrong already: {problem}")
            return True
    print(f"then: {recorded}\nnow:  {metrics}")
    print(f"wrong again: {problem}" if problem else "it did not go wrong this time")
    return bool(problem)


def _print_losses(streams: Streams, rows: list[WeightedPair]) -> None:
    for number, row in enumerate(rows):
        partner = rows[(number + 1) % len(rows)]
        result = streams.loss([row], [partner], streams.step_values([row], [partner]))
        print(f"  {row['pair_id']}: {float(result.share(1, streams.token_count([row])).detach()):.6g}")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m stages.training.replay ARTIFACT/.failed/step-000012", file=sys.stderr)
        return ConfigError.exit_code
    try:
        if replay_batch(arguments[0]):
            return 0
        return 1
    except PipelineError as error:
        return print_error(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
