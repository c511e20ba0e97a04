"""Benchmark - one GPU: is what the stages do on it right, fast, and within the plan? At most eight minutes; no download.

    make gpu-check [ARGS="--parts machine,train_1.8b --json check.json --seconds 450"]
    python -m benchmarks.gpu_check --smoke

Parts, each in a process with a time limit of its own, so that one which fails, hangs or runs out of memory costs its own
lines only:

    machine      versions, the card, its ceilings
    train_1.8b   the train stage's loop on packed pairs of 2,048 tokens: MFU, peak memory against `selfplay plan`
    weights      the weigh stage with SWIFT's weights, student 1.8 B, teacher 7 B; hours for 50,000 pairs
    pairrm       pairs per second in 16-bit batches against one by one in float32; the difference of the logits
    train_swift  as SWIFT trains: two pairs a step, prompt 100, responses 150
    sample       the sample stage (vLLM) at SWIFT's lengths
    trl          TRL's DPOTrainer on the pairs of train_1.8b
    train_135m   the same loop at 135 M
    train_lora   LoRA as swift-qwen1.5-1.8b-1x24 trains: peak memory against `selfplay plan`
    tests        pytest -m gpu

Models are random weights of the published shapes, written to a temporary directory (about 22 GB; TMPDIR names another
disk). The JSON file holds all figures and is written again after every part. `--smoke` runs tiny models on the CPU, in
one process, without the parts that train once more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from benchmarks._smoke import add_smoke

ROOT = Path(__file__).resolve().parents[1]


class Limit(NamedTuple):
    """Seconds of a part."""

    most: float
    """It is ended then."""
    least: float
    """It is not begun with less time left."""


LIMITS = {
    "machine": Limit(60, 5),
    "train_1.8b": Limit(120, 40),
    "weights": Limit(150, 60),
    "pairrm": Limit(90, 30),
    "train_swift": Limit(90, 30),
    "sample": Limit(180, 60),
    "trl": Limit(90, 40),
    "train_135m": Limit(60, 20),
    "train_lora": Limit(60, 25),
    "tests": Limit(180, 40),
}
"""In the order of their worth."""
NOT_IN_SMOKE = ("train_swift", "train_135m", "train_lora", "trl", "tests")
"""A smoke is one process, which can hold one DeepSpeed engine; and benchmarks.train has a smoke for TRL."""
GOALS = {
    ("train_1.8b", "mfu"): (">=", 0.45),
    ("trl", "ours_speed"): (">=", 2.0),
    ("trl", "ours_memory"): ("<=", 0.6),
    ("weights", "first_hours_of_50000"): ("<=", 0.21),
    ("weights", "second_hours_of_50000"): ("<=", 0.12),
    ("pairrm", "float16_speed"): (">=", 20.0),
    ("pairrm", "float16_same_winner"): (">=", 0.995),
    ("iteration", "hours"): ("<=", 1.1),
}


def parts_of(names: list[str], work: Path, smoke: bool) -> None:
    """Run parts in this process; each leaves NAME.json, or NAME.error."""
    import torch

    from benchmarks import _gpu_parts as parts

    device = "cuda" if torch.cuda.is_available() and not smoke else "cpu"
    check = parts.Check(work, smoke, device)
    for name in names:
        measure = parts.training(name) if name in parts.FULL else getattr(parts, name)
        try:
            result = measure(check)
        except Exception as error:  # a part may fail in any way; the others go on
            traceback.print_exc()
            (work / f"{name}.error").write_text(f"{type(error).__name__}: {error}")
            continue
        unfinished = work / f"{name}.json.unfinished"
        unfinished.write_text(json.dumps(result))
        os.replace(unfinished, work / f"{name}.json")


def run_parts(command: list[str], seconds: float, log: Path) -> str | None:
    """Run a command in a process group of its own; returns why it gave no result, or None if it ended well."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {seconds:.0f} s"
    if code == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: " + (lines[-1] if lines else "no output")


def _environment() -> dict[str, str]:
    """As stages/__main__.py sets it before torch is imported, and no network."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }
    return {**settings, **os.environ}


def iteration_of(results: dict[str, dict]) -> dict[str, float]:
    """Hours of a SWIFT iteration (50,000 pairs, two epochs) by the rates of its parts; {} if one is missing."""
    sampled, weighed, trained = (results.get(name, {}) for name in ("sample", "weights", "train_swift"))
    if any("error" in part or not part for part in (sampled, weighed, trained)):
        return {}
    hours = {"generate_hours": sampled["hours_of_50000"], "weights_hours": weighed["first_hours_of_50000"]}
    hours["train_hours"] = 2 * 50_000 / trained["pairs_per_second"] / 3600
    return hours | {"hours": sum(hours.values())}


def table(results: dict[str, dict]) -> str:
    """All figures, one per line; a part that failed has one line with its error."""
    lines = ["| part | figure | value | goal |", "|---|---|---|---|"]
    for part, figures in results.items():
        for name, value in figures.items():
            if isinstance(value, list):
                continue
            shown = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
            lines.append(f"| {part} | {name} | {shown} | {_verdict(part, name, value)} |")
    return "\n".join(lines)


def _verdict(part: str, name: str, value: object) -> str:
    """The figure's goal, and whether it is met."""
    if (part, name) not in GOALS or not isinstance(value, int | float):
        return ""
    relation, goal = GOALS[part, name]
    is_met = value >= goal if relation == ">=" else value <= goal
    return f"{relation} {goal}: {'met' if is_met else 'missed'}"


def measure(names: list[str], options: argparse.Namespace, work: Path) -> dict[str, dict]:
    """The figures of all parts by name; {"error": ...} for a part without any."""
    began, results = time.monotonic(), {}
    groups = [names] if options.smoke else [[name] for name in names]
    for group in groups:
        left = options.seconds - (time.monotonic() - began)
        limit = Limit(options.seconds, 0) if options.smoke else LIMITS[group[0]]
        log = work / f"{group[0]}.log"
        problem: str | None = f"left out: {left:.0f} s were left"
        if left >= limit.least:
            command = [sys.executable, "-m", "benchmarks.gpu_check", "--work", str(work), "--inside", ",".join(group)]
            problem = run_parts(command + ["--smoke"] * options.smoke, min(limit.most, left), log)
        for name in group:
            result, error = work / f"{name}.json", work / f"{name}.error"
            if result.is_file():
                results[name] = json.loads(result.read_text())
            else:
                results[name] = {"error": error.read_text() if error.is_file() else problem or "no result"}
            print(f"{name}: {results[name].get('error', 'done')} ({time.monotonic() - began:.0f} s)", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--parts", help="some of them, with commas between: " + ", ".join(LIMITS))
    parser.add_argument("--seconds", type=float, default=450, help="for all parts")
    parser.add_argument("--json", type=Path, help="default: gpu_check.json (a smoke: none)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.inside:
        parts_of(options.inside.split(","), options.work, options.smoke)
        sys.stdout.flush()
        os._exit(0)  # engines' ends print warnings, or hang
    names = options.parts.split(",") if options.parts else list(LIMITS)
    if unknown := set(names) - LIMITS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    if options.smoke:
        names = [name for name in names if name not in NOT_IN_SMOKE]
    elif options.json is None:
        options.json = Path("gpu_check.json")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        results = measure(names, options, Path(directory))
        logs = "".join(
            f"===== {log.stem}\n{log.read_text(errors='replace')}\n" for log in Path(directory).glob("*.log")
        )
    failed = [name for name, figures in results.items() if "error" in figures]
    if options.json:
        options.json.with_suffix(".log").write_text(logs)
    elif failed:
        print(logs[-3000:])
    if iteration := iteration_of(results):
        results["iteration"] = iteration
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print("\n" + table(results))
    if failed:
        raise SystemExit(f"parts without figures: {', '.join(failed)}")


if __name__ == "__main__":
    main()
