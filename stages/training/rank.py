"""Stages - one rank of a training with several: python -m stages.training.rank OUT, started by the deepspeed launcher."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from stages.stage import STAGES, Job
from stages.supervise import die_with_parent
from stages.training.stage import train_rank


def main(out: Path) -> None:
    die_with_parent()  # of the launcher: a rank alone would wait for the others for ever
    work = json.loads((out / ".ranks.json").read_text())
    stage = STAGES["train"]
    config = stage.parse(work["config"])
    main_rank = os.environ["RANK"] == "0"
    job = Job(stage, config, {}, out) if main_rank else None
    summary = train_rank(out, config, work["inputs"], job)
    if main_rank:
        (out / ".summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
