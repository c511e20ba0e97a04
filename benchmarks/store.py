"""Benchmark - rows: what a row costs from 10 thousand to a million of them.

    python -m benchmarks.store [--rows 10000 100000 1000000] [--json out.json]
    python -m benchmarks.store --stages [--rows 10000 1000000]
    python -m benchmarks.store --smoke

Every size runs in a process of its own, on one thread; no model is loaded, the log-prob passes' scorer returns zeros. A
row is a pair with 48 prompt tokens and two responses of 8 to 32, with weights and reference log-probs, in shards of
256. CPU time per row (the time on the wall, which includes the disk, is shown apart), and the process's peak resident
set. The phases:

    write     rows -> Parquet shards, flushed
    sign      digests of all files, and the record
    verify    every digest and every shard's contents again
    logps     the log-prob store: look up, write the missing rows, read them back, both responses of a row
    check     the trainer's check of every row before it starts
    train     the plan of an epoch, every step's rows fetched in its order and packed into batches

`--stages`: prompts go through sample -> score -> weigh -> train instead, and the peak of every stage is shown
(benchmarks/_stages.py).
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import _stages
from benchmarks._smoke import add_smoke

if TYPE_CHECKING:
    import numpy as np

    from data_contracts.shard_rows import ShardRows

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SHARD = 256
ROOT = Path(__file__).resolve().parents[1]
PHASES = ("write", "sign", "verify", "logps", "check", "train")


def shards(count: int) -> Iterator[tuple[int, list[dict]]]:
    """(index, rows of weighted_pairs) of each shard; random, but the same for the same count."""
    import numpy as np

    from data_contracts.shards import SCHEMAS

    empty = dict.fromkeys(SCHEMAS["weighted_pairs"].names)
    for index in range(0, count, SHARD):
        chance = np.random.default_rng([0, index])
        rows = []
        for number in range(index, min(count, index + SHARD)):
            row = empty | {
                "pair_id": f"p{number:07d}/0-1",
                "prompt_id": f"p{number:07d}",
                "prompt_ids": chance.integers(0, 49152, 48),
            }
            row |= {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0, "chosen_candidate": 0, "rejected_candidate": 1}
            for side in ("chosen", "rejected"):
                length = chance.integers(8, 33)
                row[f"{side}_ids"] = chance.integers(0, 49152, length)
                row[f"{side}_weights"] = chance.random(length, dtype=np.float32)
                row[f"{side}_reference_logps"] = -chance.random(length, dtype=np.float32)
            rows.append(row)
        yield index // SHARD, rows


class Clock:
    """CPU and wall seconds, added up per phase."""

    def __init__(self) -> None:
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self.wall = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[name] += time.process_time() - cpu
        self.wall[name] += time.perf_counter() - wall


def measure(count: int, directory: Path) -> dict:
    """Seconds per phase for `count` rows, and the process's peak memory; artifacts go to `directory`."""
    import torch  # noqa: F401 - its import is not a phase's cost

    from data_contracts.artifact import ArtifactRecord
    from data_contracts.shard_rows import ShardRows
    from data_contracts.shards import shard_path, to_table, write_shard
    from data_contracts.store import Store
    from stages.methods import METHODS
    from stages.training.batches import collate_rows, micro_batches, plan_steps, row_length
    from stages.training.stage import check_rows

    store, clock, key = Store(directory), Clock(), "0" * 64
    out = store.directory("weighted_pairs", key)
    for index, rows in shards(count):
        with clock.phase("write"):
            write_shard(shard_path(out, index), to_table(rows, "weighted_pairs"))
    record = ArtifactRecord(
        kind="weighted_pairs",
        key=key,
        stage="weigh",
        version="1",
        config={},
        inputs={},
        content="",
        files=[],
        rows=count,
    )
    with clock.phase("sign"):
        record = store.sign(record)
    with clock.phase("verify"):
        assert store.problems(record, deep=True) == []
    rows = ShardRows([out], "weighted_pairs")
    with clock.phase("logps"):
        score_all(rows, count, directory)
    with clock.phase("check"):
        check_rows(rows, METHODS.config("dpo"))
    sides = ("chosen", "rejected")
    with clock.phase("train"):
        for step in plan_steps(count, 64, 1, 0):
            step_rows = rows.pick(step.rows)
            lengths = [row_length(row, sides, True) for row in step_rows]
            for batch in micro_batches(lengths, 4096, 0, 1, True):
                collate_rows([step_rows[i] for i in batch], sides, True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": count, "cpu": clock.cpu, "wall": clock.wall, "peak_mib": peak}


def score_all(rows: ShardRows, count: int, directory: Path) -> None:
    """Fill the log-prob store with both responses of every row, then read them back."""
    import numpy as np

    from data_contracts.artifact import ArtifactRef
    from stages.models.logps import Pass

    def zeros(_, prompts, responses, __) -> list[np.ndarray]:
        return [np.zeros(len(response), np.float32) for response in responses]

    model = ArtifactRef(kind="checkpoint", key="external", path=str(directory), content="0" * 64)
    (directory / "config.json").write_text("{}")
    logps = Pass(directory, model, "float32", "cpu", 4096, score=zeros)
    logps._load = lambda: None
    for work in (logps.fill, logps.get):
        for start in range(0, count, SHARD):
            part = rows[start : min(count, start + SHARD)]
            prompts = [row["prompt_ids"] for row in part] * 2
            responses = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in part]
            work(prompts, responses)
    assert logps.misses == 2 * count


def show(results: list[dict]) -> None:
    """Print a line per size."""
    phases = " | ".join(f"{name}, us/row" for name in PHASES)
    print(f"\n| rows | {phases} | all, us/row | of the first size | on the wall, us/row | peak MiB |")
    print("|---|" + "---|" * (len(PHASES) + 4))
    first = sum(results[0]["cpu"].values()) / results[0]["rows"]
    for result in results:
        count = result["rows"]
        phases = [1e6 * result["cpu"][name] / count for name in PHASES]
        cells = [f"{value:.1f}" for value in (*phases, sum(phases))]
        cells += [f"{sum(phases) / first / 1e6:.2f}", f"{1e6 * sum(result['wall'].values()) / count:.1f}"]
        print(f"| {count} | " + " | ".join([*cells, f"{result['peak_mib']:.0f}"]) + " |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--directory", type=Path, help="where the artifacts are made; default: the temporary directory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--stages", action="store_true", help="the memory of every stage, instead of the cost of rows")
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.directory)))
        return
    if options.smoke:
        options.rows = [300]
    if options.stages or options.smoke:
        _stages.show(_stages.measure_all(options.rows, options.directory, together=options.smoke))
    if options.stages:
        return
    results = []
    for count in options.rows:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            command = [sys.executable, "-m", "benchmarks.store", "--measure", str(count), "--directory", directory]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result)
        print(count, {name: round(seconds, 1) for name, seconds in result["cpu"].items()}, flush=True)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
