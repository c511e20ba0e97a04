"""Benchmark - the estimate: what `selfplay estimate` predicts against what `selfplay run` takes.

    python -m benchmarks.estimate [--out estimate.json] [--only NAME ...]
    python -m benchmarks.estimate --smoke

Each run has a store of its own, so that the estimate comes from its calibration alone. About 15 minutes on 2 cores.
Goal: the total within 25 %, and the measured total inside the interval.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._smoke import Run, add_smoke, tiny_run

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "sppo, tiny preset": ("deploy/runs/tiny/sppo.yaml", ["iterations=1"]),
    "sppo, vLLM": ("deploy/runs/quickstart.yaml", ["iterations=1"]),
    "swift, transformers": (
        "deploy/runs/tiny/swift.yaml",
        ["iterations=1", "sampling.max_new_tokens=24", "training.epochs=2"],
    ),
    "dpo, K = 2, transformers": (
        "deploy/runs/quickstart.yaml",
        [
            "iterations=1",
            "method.name=dpo",
            "sampling.num_candidates=2",
            "sampling.backend.name=transformers",
            "sampling.max_new_tokens=16",
            "prompts.per_iteration=48",
        ],
    ),
}
"""Name -> (run config, settings)."""
SMOKE = "smoke"


def selfplay(*words: str, store: Path) -> float:
    """Run `selfplay WORDS` on a store; returns seconds on the wall. Exits with its last output if it fails."""
    environment = os.environ | {"SELFPLAY_STORE": str(store), "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return seconds


def run_of(name: str, directory: Path) -> Run:
    """A run of the table RUNS with an empty store in `directory`, or the smoke run."""
    if name == SMOKE:
        return tiny_run(directory)
    return Run(*RUNS[name], directory / "store")


def measure(run: Run) -> dict[str, float]:
    """Estimate one run, play it, and compare. Seconds, but for `error`, which is relative to what was measured."""
    options = [word for setting in run.settings for word in ("--set", setting)]
    calibration = selfplay("estimate", run.config, *options, store=run.store)
    measured = selfplay("run", run.config, *options, store=run.store)
    estimate = json.loads(next(run.store.glob("runs/*/estimate.json")).read_text())
    return {
        "calibration": calibration,
        "predicted": estimate["seconds"],
        "half_width": estimate["half_width"],
        "measured": measured,
        "error": estimate["seconds"] / measured - 1,
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Print a line per run."""
    print(f"\n{'run':24} {'calibration':>12} {'predicted':>10} {'+-':>6} {'measured':>9} {'error':>7}")
    for name, result in results.items():
        print(
            f"{name:24} {result['calibration']:10.0f} s {result['predicted']:8.0f} s {result['half_width']:4.0f} s "
            f"{result['measured']:7.0f} s {result['error']:+7.0%}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.only = [SMOKE]
    results = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measure(run_of(name, Path(directory)))
        print(json.dumps({name: results[name]}), flush=True)
    show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
