"""Slurm's commands for tests: under the name `sbatch` it checks the directives and runs the job here, and so on; its directory is the memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(__file__).parent
MOST_GPUS = 8


def sbatch(words):
    lines = Path(words[-1]).read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")] + words[:-1]
    asked = dict(re.fullmatch(r"--([a-z-]+)(?:=(.*))?", option).groups() for option in options)
    number = len(list(HOME.glob("job-*.json"))) + 1
    (HOME / f"job-{number}.json").write_text(json.dumps(asked))
    if int(asked.get("gpus-per-node") or 0) > MOST_GPUS:
        sys.exit("sbatch: error: Batch job submission failed: Requested node configuration is not available")
    if (HOME / "busy").exists():
        (HOME / f"state-{number}").write_text("PENDING")
    else:
        environment = os.environ | {"SLURM_JOB_ID": str(number), "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
        with open(asked["output"].replace("%j", str(number)), "w") as log:
            process = subprocess.Popen(
                ["bash", words[-1]], stdout=log, stderr=log, start_new_session=True, env=environment
            )
        (HOME / f"pid-{number}").write_text(str(process.pid))
        if os.fork() == 0:  # slurmctld's part: to know when the job is over
            quiet = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):  # or whoever called sbatch would wait for the end of its output
                os.dup2(quiet, stream)
            subprocess.run(["tail", f"--pid={process.pid}", "-f", "/dev/null"], check=False)
            (HOME / f"state-{number}").write_text("COMPLETED")
            os._exit(0)
    print(number)


def squeue(words):
    number = next(word for word in words if word.startswith("--jobs=")).partition("=")[2]
    state = HOME / f"state-{number}"
    print(state.read_text() if state.exists() else "RUNNING")


def scancel(words):
    (HOME / f"state-{words[0]}").write_text("CANCELLED")
    if (HOME / f"pid-{words[0]}").exists():
        os.killpg(int((HOME / f"pid-{words[0]}").read_text()), 15)


def scontrol(words):
    print("n1")


def srun(words):
    while words[0].startswith("--"):
        words.pop(0)
    os.execvp(words[0], words)


{"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": scontrol, "srun": srun}[Path(sys.argv[0]).name](
    sys.argv[1:]
)
