"""Benchmark - a long run of tiny iterations: does anything grow that should not?

    python -m benchmarks.soak [--minutes 120] [--every 10] [--out FILE.jsonl]

One `python -m flows` with as many small iterations as fit (canned sampler, real training), watched from outside: memory and open files of the
run and of its Prefect server, processes, temporary files, the databases, the store. What a run must keep (rows in the databases, artifacts)
grows by the same amount with each iteration; nothing else may. Exit code 1 if something does.
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
from pathlib import Path
from typing import Any

import psutil
import yaml

from data_contracts.files import bytes_below
from tests.conftest import build_model, prompt_rows
from tests.faults.whole import Play, write_config

PER_ITERATION = {"flow MB": 1.0, "server MB": 1.0}
"""Most that may be added with each iteration: what the run keeps for its report, and the server's caches."""
LEVEL = {"flow files": 8, "server files": 8, "processes": 2, "temporary files": 0}
"""Most by which the last quarter's median may lie above the first quarter's."""


def measure(play: Play, store: Path) -> dict[str, float]:
    """One look at everything."""
    found: dict[str, float] = {"processes": 0, "server MB": 0.0, "server files": 0}
    for pid in play.tree():
        try:
            process = psutil.Process(pid)
            words, rss, files = process.cmdline(), process.memory_info().rss / 1e6, process.num_fds()
        except psutil.Error:
            continue
        if pid == play.process.pid:
            found |= {"flow MB": rss, "flow files": files}
        elif "uvicorn" in words and "stages.running.supervise" not in words:
            found |= {"server MB": rss, "server files": files}
        found["processes"] += (
            "stages" not in words
            and "stages.running.supervise" not in words
            and "multiprocessing" not in " ".join(words)
        )
    found["temporary files"] = sum(1 for path in store.rglob("*.tmp-*") if time.time() - path.lstat().st_mtime > 60)
    for name, path in (("prefect.db MB", store / "prefect" / "prefect.db"), ("mlflow.db MB", store / "mlflow.db")):
        found[name] = path.stat().st_size / 1e6 if path.exists() else 0.0
    found["artifacts MB"] = bytes_below(store / "artifacts") / 1e6
    found["iterations"] = len([path for path in store.glob("runs/soak/iter_*") if (path / "evaluate").is_symlink()])
    return found


def judge(looks: list[dict[str, float]]) -> tuple[list[str], str]:
    """What grew, and a table of it all. The first fifth is warming up."""
    steady = looks[len(looks) // 5 :]
    first, last = steady[: max(1, len(steady) // 4)], steady[-max(1, len(steady) // 4) :]
    iterations = max(
        1.0,
        statistics.mean(look["iterations"] for look in last) - statistics.mean(look["iterations"] for look in first),
    )
    lines, problems = ["| | first quarter | last quarter | per iteration |", "|---|---|---|---|"], []
    for name in looks[-1]:
        if name == "iterations":
            continue
        before, after = (statistics.median(look.get(name, 0.0) for look in part) for part in (first, last))
        rate = (after - before) / iterations
        lines.append(f"| {name} | {before:.1f} | {after:.1f} | {rate:+.3f} |")
        if rate > PER_ITERATION.get(name, float("inf")) or after - before > LEVEL.get(name, float("inf")):
            problems.append(f"{name} grew from {before:.1f} to {after:.1f} in {iterations:.1f} iterations")
    return problems, "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=10, help="seconds between two looks")
    parser.add_argument("--out", type=Path, help="append every look here")
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    looks: list[dict[str, Any]] = []
    try:
        config = write_config(root, build_model(root / "model"), prompt_rows(6), prompt_rows(3, first=100))
        run = yaml.safe_load(config.read_text()) | {"name": "soak", "iterations": 1000}
        run["prompts"] |= {"reuse": True}
        run["training"] |= {
            "learning_rate": 1e-7
        }  # hundreds of iterations on six prompts: at any usual rate the log-ratios explode after thirty
        config.write_text(yaml.safe_dump(run, sort_keys=False))
        play = Play(config, root / "store", root)
        began = time.monotonic()
        try:
            while time.monotonic() - began < 60 * options.minutes:
                time.sleep(options.every)
                if play.process.poll() is not None:
                    print(play.log.read_text()[-3000:])
                    print(f"the run ended by itself with {play.process.returncode}")
                    return 1
                looks.append({"seconds": round(time.monotonic() - began, 1), **measure(play, root / "store")})
                if options.out:
                    with open(options.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(looks[-1]) + "\n")
        finally:
            play.process.send_signal(signal.SIGINT)
            play.end(120)
            left = play.remains()
        problems, text = judge([{name: value for name, value in look.items() if name != "seconds"} for look in looks])
        problems += [f"left running: {command}" for command in left]
        print(f"{(time.monotonic() - began) / 60:.1f} minutes, {looks[-1]['iterations']:.0f} iterations\n\n{text}\n")
        print("\n".join(problems) or "nothing grew that should not")
        return 1 if problems else 0
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
