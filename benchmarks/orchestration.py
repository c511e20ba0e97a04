"""What Prefect, the flow and the tasks cost over the stages themselves: one whole run, then the same command again, with everything built.

    python -m benchmarks.orchestration [--config deploy/runs/quickstart.yaml] [--set section.field=value ...] [--json out.json]

By default three iterations of the tiny SPPO preset on a random model of 0.1 M weights. Overhead: seconds on the wall from the command's start to
its end, less the seconds that the stages' records say they took, each from its process's start to its signature. The second run builds nothing: all of it is
overhead. The processor's time is that of the command and everything it starts; for the second run that is the flow and its server alone, and other
work on the machine does not stretch it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def play(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    return {"wall": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="deploy/runs/tiny/sppo.yaml")
    parser.add_argument("--model", help="default: a random one of 0.1 M weights")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value", dest="overrides")
    parser.add_argument("--repeats", type=int, default=2, help="cached runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if not options.model:
            from tests.conftest import build_model

            options.model = str(build_model(Path(directory, "model")))
        assignments = [f"policy.path={options.model}", "iterations=3", "prompts.reuse=true", *options.overrides]
        store = Path(directory, "store")
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "SELFPLAY_STORE": str(store)}
        command = [
            sys.executable,
            "-m",
            "flows",
            "run",
            options.config,
            *(part for text in assignments for part in ("--set", text)),
        ]
        built = play(command, environment)
        records = [json.loads(path.read_text()) for path in (store / "artifacts").rglob("record.json")]
        stages = [record["seconds"]["wall"] for record in records if "wall" in record.get("seconds", {})]
        cached = [play(command, environment) for _ in range(options.repeats)]
    overhead = built["wall"] - sum(stages)
    print(
        f"{options.config}, {len(stages)} stages\n\n| run | wall, s | CPU, s | of it stages, s | overhead, s | overhead / stages |\n|---|---|---|---|---|---|"
    )
    share = overhead / sum(stages)
    print(f"| built | {built['wall']:.1f} | {built['cpu']:.1f} | {sum(stages):.1f} | {overhead:.1f} | {share:.1%} |")
    for number, run in enumerate(cached, 1):
        print(f"| cached {number} | {run['wall']:.1f} | {run['cpu']:.1f} | 0 | {run['wall']:.1f} | |")
    if options.json:
        options.json.write_text(
            json.dumps({"built": built, "stages": stages, "cached": cached, "overhead": overhead}, indent=1)
        )


if __name__ == "__main__":
    main()
