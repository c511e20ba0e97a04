"""python -m stages.training.rank OUT: one rank of a training with several, started by stages/training/launch.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from data_contracts.errors import PipelineError, TransientError, print_error
from stages.job import Job
from stages.models.lazy import torch
from stages.running.supervise import die_with_parent
from stages.stage import STAGES
from stages.training.config import TrainingConfig, TrainingInputs
from stages.training.stage import train_rank


def main(out: Path) -> int:
    """Train as the rank that the environment names; the exit code says whether another try can help."""
    die_with_parent()  # a rank that survived its launcher would wait for the others for ever
    work = json.loads((out / ".ranks.json").read_text())
    config = TrainingConfig.model_validate(work["config"])
    is_main = os.environ["RANK"] == "0"
    job = Job(STAGES["train"], config, {}, out) if is_main else None
    try:
        summary = train_rank(out, config, TrainingInputs(**work["inputs"]), job)
    except PipelineError as error:
        return print_error(error)
    except RuntimeError as error:
        if not _is_connection_error(error):
            raise
        return print_error(
            TransientError(f"rank {os.environ['RANK']} has lost another one: {str(error).splitlines()[0]}")
        )
    if is_main:
        (out / ".summary.json").write_text(json.dumps(summary))
    return 0


def _is_connection_error(error: RuntimeError) -> bool:
    """Whether another rank, or the way to it, is gone. gloo raises a plain RuntimeError that names its source file."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
