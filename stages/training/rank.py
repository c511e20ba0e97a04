"""Stages - one rank of a training with several: python -m stages.training.rank OUT, started by the deepspeed launcher."""

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
from stages.training.stage import train_rank


def main(out: Path) -> int:
    """The exit code says whether another try can help: the launcher hands it on."""
    die_with_parent()  # of the launcher: a rank alone would wait for the others for ever
    work = json.loads((out / ".ranks.json").read_text())
    stage = STAGES["train"]
    config = stage.parse(work["config"])
    main_rank = os.environ["RANK"] == "0"
    job = Job(stage, config, {}, out) if main_rank else None
    try:
        summary = train_rank(out, config, work["inputs"], job)
    except PipelineError as error:
        return print_error(error)
    except RuntimeError as error:
        if not _is_of_the_wire(error):
            raise
        return print_error(
            TransientError(f"rank {os.environ['RANK']} has lost another one: {str(error).splitlines()[0]}")
        )
    if main_rank:
        (out / ".summary.json").write_text(json.dumps(summary))
    return 0


def _is_of_the_wire(error: RuntimeError) -> bool:
    """Whether another rank, or the way to it, is gone. Of gloo torch makes a plain RuntimeError that names the file it comes from."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
