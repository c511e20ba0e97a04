"""Benchmark - orchestration: what Prefect, the flow and the tasks cost beside the stages.

Measured in one whole run, and in the same run when everything is built already.

    python -m benchmarks.orchestration [--config deploy/runs/quickstart.yaml] [--set section.field=value ...] [--json
    out.json] python -m benchmarks.orchestration --smoke

By default three iterations of the tiny SPPO preset on a random model of 0.1 M weights. Overhead: seconds on the wall
from the command's start to its end, less the seconds in the stages' records, each from its process's start to its
signature; start-up is what of those no shard, step or answer took: imports and models. SELFPLAY_FORK_SERVER=off before
the command shows what interpreters of their own cost instead of forks. Then the same command, which finds that the run
is complete; the same again without the note of that, so that it is played through Prefect and MLflow and finds every
artifact; what that cannot be faster than, an empty `prefect server` up to its first answer beside `import prefect,
mlflow`; and the commands that look at a run. All of these build nothing. CPU time is that of the stages, as their
records say, and of the command and the Prefect server; other work on the machine stretches it by a third at most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._smoke import Run, add_smoke, tiny_model, tiny_run
from flows.cli.server import _free_port
from flows.config import load_run, parse_assignment
from flows.tracked import COMPLETE
from tasks.forkserver import SWITCH

ROOT = Path(__file__).resolve().parents[1]
LEAST = """
import os, sys
from pathlib import Path
from flows.cli.server import _Server, _wait_for_start
os.environ |= {"PREFECT_HOME": sys.argv[1], "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
server = _Server(port := int(sys.argv[2]), Path(sys.argv[1]) / "server.log")
import prefect, mlflow
_wait_for_start(server, f"http://127.0.0.1:{port}/api")
server.stop()
"""
"""A server that is started in a home that has its database, beside the imports of its client and of MLflow's."""


def play(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command; returns its `wall` and `cpu` seconds. Exits with its last output if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    return {"wall": seconds, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def run_of(options: argparse.Namespace, directory: Path) -> Run:
    """The run to be measured."""
    if options.smoke:
        return tiny_run(directory)
    model = options.model or tiny_model(directory / "model")
    settings = [f"policy.path={model}", "iterations=3", "prompts.reuse=true", *options.overrides]
    return Run(options.config, settings, directory / "store")


def looked_at(command: str, run: Run) -> list[str]:
    """The arguments of a command that looks at the run."""
    overrides = [word for setting in run.settings for word in ("--set", setting)]
    if command == "ledger":
        return [load_run(run.config, dict(map(parse_assignment, run.settings))).name]
    return [run.config, *overrides]


def replay(command: list[str], environment: dict[str, str], store: Path) -> dict[str, float]:
    """Run the command without the note that its run is complete."""
    for note in store.glob(f"runs/*/{COMPLETE}"):
        note.unlink()
    return play(command, environment)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration")
    parser.add_argument("--config", default="deploy/runs/tiny/sppo.yaml")
    parser.add_argument("--model", help="default: a random one of 0.1 M weights")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value", dest="overrides")
    parser.add_argument(
        "--repeats", type=int, default=3, help="goes of every command that builds nothing; medians are shown"
    )
    parser.add_argument("--json", type=Path)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.repeats = 1
    with tempfile.TemporaryDirectory() as directory:
        run = run_of(options, Path(directory))
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "SELFPLAY_STORE": str(run.store)}
        # Some shells set it, and every command would compile our modules anew.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        overrides = [word for setting in run.settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "flows", "run", run.config, *overrides]
        built = play(command, environment)
        records = [json.loads(path.read_text()) for path in (run.store / "artifacts").rglob("record.json")]
        if os.environ.get(SWITCH) != "off":  # nobody waits for forks
            built["cpu"] += sum(record["cost"].get("cpu_seconds", 0) for record in records)
        stages = [record["seconds"]["wall"] for record in records if "wall" in record.get("seconds", {})]
        again = {"complete": command}
        again |= {name: [*command[:3], name, *looked_at(name, run)] for name in ("status", "ledger", "plan")}
        found = {name: [play(line, environment) for _ in range(options.repeats)] for name, line in again.items()}
        found["played, all found"] = [replay(command, environment, run.store) for _ in range(options.repeats)]
        least = [sys.executable, "-c", LEAST, str(run.store / "prefect"), str(_free_port())]
        found["server and imports alone"] = [play(least, environment) for _ in range(options.repeats)]
    overhead, start_up = built["wall"] - sum(stages), sum(record["seconds"].get("start_up", 0) for record in records)
    print(f"{run.config}, {len(stages)} stages\n")
    print("| run | wall, s | CPU, s | stages, s | start-up of the stages, s | overhead, s |\n|---|---|---|---|---|---|")
    print(
        f"| built | {built['wall']:.1f} | {built['cpu']:.1f} | {sum(stages):.1f} | {start_up:.1f} "
        f"({start_up / sum(stages):.0%}) | {overhead:.1f} |"
    )
    for name, goes in found.items():
        wall, cpu = (statistics.median(go[column] for go in goes) for column in ("wall", "cpu"))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | 0 | 0 | {wall:.2f} |")
    if options.json:
        result = {"built": built, "stages": stages, "start_up": start_up, "found": found, "overhead": overhead}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
