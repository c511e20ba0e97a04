"""What a row costs from 10 thousand to a million of them: writing, signing, verifying, the log-prob store, and the trainer's reading.

    python -m benchmarks.store [--rows 10000 100000 1000000] [--json out.json]

Every size runs in a process of its own, on one thread; no model is loaded, the passes' scorer returns zeros. A row is a pair with 48 prompt
tokens and two responses of 8 to 32, with weights and reference log-probs, in shards of 256. Processor's time per row (the disk's is shown
apart, on the wall), and the process's peak resident set.

    write     rows -> Parquet shards, flushed
    sign      digests of all files, and the record
    verify    every digest and every shard's contents again
    logps     the log-prob store: look up, write the missing rows, read them back, both responses of a row
    check     the trainer's check of every row before it starts
    train     the plan of an epoch, every step's rows fetched in its order and packed into batches
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
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SHARD = 256
ROOT = Path(__file__).resolve().parents[1]
PHASES = ("write", "sign", "verify", "logps", "check", "train")


def shards(count: int) -> Iterator[tuple[int, list[dict]]]:
    import numpy as np

    from data_contracts.shards import SCHEMAS

    empty = dict.fromkeys(SCHEMAS["weighted_pairs"].names)
    for index in range(0, count, SHARD):
        draw = np.random.default_rng([0, index])
        rows = []
        for number in range(index, min(count, index + SHARD)):
            row = empty | {
                "pair_id": f"p{number:07d}/0-1",
                "prompt_id": f"p{number:07d}",
                "prompt_ids": draw.integers(0, 49152, 48),
            }
            row |= {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0, "chosen_candidate": 0, "rejected_candidate": 1}
            for side in ("chosen", "rejected"):
                length = draw.integers(8, 33)
                row[f"{side}_ids"] = draw.integers(0, 49152, length)
                row[f"{side}_weights"] = draw.random(length, dtype=np.float32)
                row[f"{side}_reference_logps"] = -draw.random(length, dtype=np.float32)
            rows.append(row)
        yield index // SHARD, rows


def measure(count: int, directory: Path) -> dict:
    import numpy as np
    import torch  # noqa: F401 - its import is not a phase's cost

    from data_contracts.artifact import ArtifactRecord, ArtifactRef
    from data_contracts.shards import ShardRows, shard_path, to_table, write_shard
    from data_contracts.store import Store
    from stages.methods import METHODS
    from stages.models.logps import Pass
    from stages.training.batches import collate_rows, micro_batches, plan_steps, row_length
    from stages.training.stage import check_rows

    store = Store(directory)
    out = store.directory("weighted_pairs", "0" * 64)
    cpu, wall = {}, {}

    def phase(name: str, began: tuple[float, float]) -> None:
        cpu[name] = cpu.get(name, 0.0) + time.process_time() - began[0]
        wall[name] = wall.get(name, 0.0) + time.perf_counter() - began[1]

    now = lambda: (time.process_time(), time.perf_counter())  # noqa: E731
    for index, rows in shards(count):
        began = now()
        write_shard(shard_path(out, index), to_table(rows, "weighted_pairs"))
        phase("write", began)
    began = now()
    record = store.sign(ArtifactRecord(kind="weighted_pairs", key="0" * 64, stage="weigh", version="1", config={}, inputs={}, content="", files=[], rows=count))  # fmt: skip
    phase("sign", began)
    began = now()
    assert store.problems(record, deep=True) == []
    phase("verify", began)
    model = ArtifactRef(kind="checkpoint", key="external", path=str(directory), content="0" * 64)
    (directory / "config.json").write_text("{}")
    one = Pass(
        directory,
        model,
        "float32",
        "cpu",
        4096,
        score=lambda _, prompts, responses, __: [np.zeros(len(r), np.float32) for r in responses],
    )
    one._load = lambda: None
    rows = ShardRows([out], "weighted_pairs")
    began = now()
    chunks = [(start, min(count, start + SHARD)) for start in range(0, count, SHARD)]
    for read in (False, True):
        for start, end in chunks:
            part = rows[start:end]
            prompts = [row["prompt_ids"] for row in part] * 2
            responses = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in part]
            one.get(prompts, responses) if read else one.fill(prompts, responses)
    phase("logps", began)
    assert one.misses == 2 * count
    del one
    began = now()
    check_rows(rows, METHODS.config("dpo"))
    phase("check", began)
    began = now()
    sides = ("chosen", "rejected")
    for step in plan_steps(count, 64, 1, 0):
        picked = rows.pick(step.rows)
        for batch in micro_batches([row_length(row, sides, True) for row in picked], 4096, 0, 1, True):
            collate_rows([picked[i] for i in batch], sides, True)
    phase("train", began)
    return {
        "rows": count,
        "cpu": cpu,
        "wall": wall,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument(
        "--directory", type=Path, help="where the artifacts are made; default: the system's temporary directory"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.directory)))
        return
    results = []
    for count in options.rows:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            command = [sys.executable, "-m", "benchmarks.store", "--one", str(count), "--directory", directory]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        result = results[-1]
        print(
            count,
            {name: round(value, 1) for name, value in result["cpu"].items()},
            round(result["peak_mib"]),
            flush=True,
        )
    print(
        "\n| rows | "
        + " | ".join(f"{name}, us/row" for name in PHASES)
        + " | all, us/row | of the first size | on the wall, us/row | peak MiB |"
    )
    print("|---|" + "---|" * (len(PHASES) + 4))
    first = sum(results[0]["cpu"].values()) / results[0]["rows"]
    for result in results:
        each = [1e6 * result["cpu"][name] / result["rows"] for name in PHASES]
        wall = 1e6 * sum(result["wall"].values()) / result["rows"]
        cells = [f"{value:.1f}" for value in (*each, sum(each))] + [
            f"{sum(each) / first / 1e6:.2f}",
            f"{wall:.1f}",
            f"{result['peak_mib']:.0f}",
        ]
        print(f"| {result['rows']} | " + " | ".join(cells) + " |")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
