"""Predicted against measured: `selfplay estimate`, then `selfplay run`, for runs that differ in sampler, method and size.

    python benchmarks/estimate.py [--out estimate.json] [--only NAME ...]

Each run has a store of its own, so that the estimate comes from its calibration alone. About 15 minutes on 2 cores. Goal: the total within
25 %, and the measured total inside the interval.
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

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(ROOT))
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


def measure(config: str, settings: list[str]) -> dict[str, float]:
    options = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as store:
        environment = os.environ | {"SELFPLAY_STORE": store}
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "flows", "estimate", config, *options], cwd=ROOT, env=environment, check=True
        )
        calibrated = time.monotonic() - began
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "flows", "run", config, *options],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        took = time.monotonic() - began
        if done.returncode:
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        said = json.loads(next(Path(store).glob("runs/*/estimate.json")).read_text())
    return {"calibration": calibrated, "predicted": said["seconds"], "half_width": said["half_width"], "measured": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    options = parser.parse_args()
    results = {}
    for name in options.only:
        results[name] = one = measure(*RUNS[name])
        one["error"] = one["predicted"] / one["measured"] - 1
        print(json.dumps({name: one}), flush=True)
    print(f"\n{'run':24} {'calibration':>12} {'predicted':>10} {'+-':>6} {'measured':>9} {'error':>7}")
    for name, one in results.items():
        print(
            f"{name:24} {one['calibration']:10.0f} s {one['predicted']:8.0f} s {one['half_width']:4.0f} s {one['measured']:7.0f} s {one['error']:+7.0%}"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
