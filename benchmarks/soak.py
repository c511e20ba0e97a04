"""Benchmark - a long run of tiny iterations: does anything grow that should not?

    python -m benchmarks.soak [--minutes 120] [--every 10] [--out FILE.jsonl]
    python -m benchmarks.soak --smoke

One `python -m flows` with as many small iterations as fit (canned sampler, real training), watched from outside: memory
and open files of the run, of its Prefect server and of its fork server, processes, temporary files, the databases, the store. What a run
must keep (rows in the databases, artifacts) grows by the same amount with each iteration; nothing else may. Exit code 1
if something does. `--smoke` watches until the run's server is up.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from benchmarks._smoke import add_smoke
from data_contracts.files import bytes_below
from tests.conftest import build_model, prompt_rows
from tests.faults.whole import Play, write_config

PER_ITERATION = {"flow MB": 1.0, "server MB": 1.0, "fork server MB": 0.1}
"""Largest growth per iteration: what the run keeps for its report, and the server's caches."""
LEVEL = {"flow files": 8, "server files": 8, "fork server files": 0, "processes": 2, "temporary files": 0}
"""Largest excess of the last quarter's median over the first quarter's."""


def measure(play: Play, store: Path) -> dict[str, float]:
    """One sample of everything that is watched."""
    sample: dict[str, float] = {"processes": 0, "server MB": 0.0, "server files": 0}
    for pid in play.tree():
        try:
            process = psutil.Process(pid)
            words, rss, files = process.cmdline(), process.memory_info().rss / 1e6, process.num_fds()
        except psutil.Error:
            continue
        if pid == play.process.pid:
            sample |= {"flow MB": rss, "flow files": files}
        elif "uvicorn" in words and "stages.running.supervise" not in words:
            sample |= {"server MB": rss, "server files": files}
        elif "stages.forkserver" in words:
            sample |= {"fork server MB": rss, "fork server files": files}
        sample["processes"] += (
            "stages" not in words
            and "stages.running.supervise" not in words
            and "multiprocessing" not in " ".join(words)
        )
    sample["temporary files"] = sum(1 for path in store.rglob("*.tmp-*") if time.time() - path.lstat().st_mtime > 60)
    for name, path in (("prefect.db MB", store / "prefect" / "prefect.db"), ("mlflow.db MB", store / "mlflow.db")):
        sample[name] = path.stat().st_size / 1e6 if path.exists() else 0.0
    sample["artifacts MB"] = bytes_below(store / "artifacts") / 1e6
    sample["iterations"] = len([path for path in store.glob("runs/soak/iter_*") if (path / "evaluate").is_symlink()])
    return sample


def judge(samples: list[dict[str, float]]) -> tuple[list[str], str]:
    """A sentence for each figure that grew too much, and a table of all figures. The first fifth is warming up."""
    steady = samples[len(samples) // 5 :]
    first, last = steady[: max(1, len(steady) // 4)], steady[-max(1, len(steady) // 4) :]
    done = [statistics.mean(sample["iterations"] for sample in part) for part in (first, last)]
    iterations = max(1.0, done[1] - done[0])
    lines, problems = ["| | first quarter | last quarter | per iteration |", "|---|---|---|---|"], []
    for name in samples[-1]:
        if name == "iterations":
            continue
        before, after = (statistics.median(sample.get(name, 0.0) for sample in part) for part in (first, last))
        rate = (after - before) / iterations
        lines.append(f"| {name} | {before:.1f} | {after:.1f} | {rate:+.3f} |")
        if rate > PER_ITERATION.get(name, float("inf")) or after - before > LEVEL.get(name, float("inf")):
            problems.append(f"{name} grew from {before:.1f} to {after:.1f} in {iterations:.1f} iterations")
    return problems, "\n".join(lines)


def configure(root: Path) -> Path:
    """The run config of a soak: a thousand tiny iterations on the same six prompts."""
    config = write_config(root, build_model(root / "model"), prompt_rows(6), prompt_rows(3, first=100))
    run = yaml.safe_load(config.read_text()) | {"name": "soak", "iterations": 1000}
    run["prompts"] |= {"reuse": True}
    # Hundreds of iterations on six prompts: at any usual rate the log-ratios explode after thirty.
    run["training"] |= {"learning_rate": 1e-7}
    config.write_text(yaml.safe_dump(run, sort_keys=False))
    return config


def watch(
    play: Play,
    store: Path,
    minutes: float,
    every: float,
    out: Path | None,
    is_enough: Callable[[dict[str, float]], bool],
) -> list[dict[str, float]]:
    """One sample each `every` seconds, until `is_enough` says so. Exits if the run ends by itself."""
    began = time.monotonic()
    samples: list[dict[str, float]] = []
    while time.monotonic() - began < 60 * minutes and not (samples and is_enough(samples[-1])):
        time.sleep(every)
        if play.process.poll() is not None:
            raise SystemExit(f"{play.log.read_text()[-3000:]}\nthe run ended by itself with {play.process.returncode}")
        samples.append(measure(play, store))
        if out:
            with open(out, "a", encoding="utf-8") as file:
                line = {"seconds": round(time.monotonic() - began, 1), **samples[-1]}
                file.write(json.dumps(line) + "\n")
    return samples


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples")
    parser.add_argument("--out", type=Path, help="append every sample here")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.minutes, options.every = 3, 1
    root = Path(tempfile.mkdtemp(prefix="soak-"))

    def is_enough(sample: dict[str, float]) -> bool:
        return options.smoke and sample["server MB"] > 0

    try:
        play = Play(configure(root), root / "store", root)
        try:
            samples = watch(play, root / "store", options.minutes, options.every, options.out, is_enough)
        finally:
            play.process.send_signal(signal.SIGINT)
            play.end(120)
            remaining = play.remains()
        problems, text = judge(samples)
        if options.smoke:  # a run that is starting grows
            problems = [] if is_enough(samples[-1]) else ["the run's server was never seen"]
        problems += [f"left running: {command}" for command in remaining]
        print(f"{options.minutes:g} minutes, {samples[-1]['iterations']:.0f} iterations\n\n{text}\n")
        print("\n".join(problems) or "nothing grew that should not")
        return 1 if problems else 0
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
