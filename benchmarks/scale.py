"""python benchmarks/scale.py [--workers 1,2,4,...,256] [--shards 1024] [--out FILE.json]: sharded stages on paper: throughput, tail and overhead.

Two parts. `--real N` runs the real thing: N processes claim, write and sign shards of one artifact on this machine's disk, models faked by a sleep; it
measures what a claim, a shard and a signature cost. The simulation then plays the claims' own order of work (begin apart, what failed comes last, two
tries) with those costs on 1-256 workers, with stragglers and failures, thousands of times faster than time. The store serialises what a shared
file system serialises: the metadata operations of claims.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_contracts.artifact import ArtifactRecord
from data_contracts.shards import shard_is_whole, shard_path, to_table, write_shard
from data_contracts.store import Store
from stages.running.claims import TRIES, Claims, forget


class Costs(NamedTuple):
    """Seconds, measured or assumed."""

    shard: float
    """Making one shard: the model's work."""
    start: float
    """A worker's way to its first shard: queue, process, import, model."""
    claim: float
    """Opening, locking and writing down one claim."""
    look: float
    """Finding a shard taken or done."""
    write: float
    """Writing a shard, with its flush to disk."""
    sign_shard: float
    """Digesting one shard at the signature."""
    restart: float
    """Until a lost worker is noticed and its successor is asked for."""


class Trouble(NamedTuple):
    straggler_rate: float
    """Part of the workers that are slow."""
    straggler_factor: float
    failure_rate: float
    """Chance that a worker dies of a shard."""


def real(workers: int, shards: int, rows: int, sleep: float) -> dict[str, float]:
    """The store and the claims for real, on this disk: what the bookkeeping of a shard costs."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCALE_DIRECTORY")) as root:
        store = Store(Path(root) / "store")
        directory = store.directory("prompts", "0" * 16)
        directory.mkdir(parents=True)
        row = dict.fromkeys(("response", "chosen", "rejected")) | {
            "messages": [{"role": "user", "content": "x" * 200}],
            "checks": "[]",
            "source": "scale",
        }
        table = to_table([row | {"prompt_id": f"p{number}"} for number in range(rows)], "prompts")

        def work(number: int) -> tuple[float, float, int]:
            writing = 0.0
            made = 0
            began = time.monotonic()
            claims = Claims(directory, f"{number}/{workers}")
            for index in claims.share(
                "part", shards, lambda index: shard_is_whole(shard_path(directory, index), "prompts"), str
            ):
                time.sleep(sleep)
                start = time.monotonic()
                write_shard(shard_path(directory, index), table)
                writing += time.monotonic() - start
                made += 1
            return time.monotonic() - began, writing, made

        began = time.monotonic()
        results = _forked(work, workers)
        wall = time.monotonic() - began
        start = time.monotonic()
        assert not list(
            Claims(directory, "0/1").share("part", shards, lambda index: False, str)
        )  # all done: one look at each
        look = (time.monotonic() - start) / shards
        forget(directory)
        start = time.monotonic()
        record = ArtifactRecord(
            kind="prompts",
            key="0" * 16,
            stage="scale",
            version="1",
            config={},
            inputs={},
            content="",
            files=[],
            rows=shards * rows,
        )
        signed = store.sign(record)
        assert len(signed.files) == shards
        busy, writing = sum(result[0] for result in results), sum(result[1] for result in results)
        return {
            "workers": workers,
            "shards": shards,
            "wall": wall,
            "shards_per_second": shards / wall,
            "write": writing / shards,
            "bookkeeping": max(0.0, busy - writing - shards * sleep) / shards,
            "look": look,
            "sign_shard": (time.monotonic() - start) / shards,
        }


def _forked(work, count: int) -> list[tuple[float, float, int]]:
    """Results of forked workers, through pipes."""
    readers, children = [], []
    for number in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.write(writer, json.dumps(work(number)).encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [tuple(json.loads(os.read(reader, 4096))) for reader in readers]


def simulate(workers: int, shards: int, costs: Costs, trouble: Trouble, seed: int) -> dict[str, float]:
    """One stage: when it is signed, how long its last shards were waited for, what went into bookkeeping.

    The claims are taken in the order of stages/running/claims.py: each worker begins at its own place and passes over what is taken; a shard that
    killed its worker is made after all others, and given up after two tries; a lost worker is replaced. Claims go through the file system one at a time.
    """
    chance = random.Random(seed)
    speed = [trouble.straggler_factor if chance.random() < trouble.straggler_rate else 1.0 for _ in range(workers)]
    taken, failed = set(), []
    place = [worker * shards // workers for worker in range(workers)]
    looked = [0] * workers
    # (time, worker); a file system that does one metadata operation at a time is free again at `disk`.
    ready = [(costs.start * chance.uniform(1.0, 1.5), worker) for worker in range(workers)]
    heapq.heapify(ready)
    disk = bookkeeping = 0.0
    ends, idle, tries, poison = [], [], {}, 0
    while ready:
        now, worker = heapq.heappop(ready)
        passed, index = 0, None
        while looked[worker] < shards and index is None:
            candidate = place[worker]
            place[worker] = (candidate + 1) % shards
            looked[worker] += 1
            index, passed = (candidate, passed) if candidate not in taken else (None, passed + 1)
        if index is None and failed:
            index = failed.pop()
        disk = max(disk, now) + passed * costs.look + costs.claim * (index is not None)
        bookkeeping += disk - now
        if index is None:
            idle.append(disk)
            continue
        taken.add(index)
        if chance.random() < trouble.failure_rate:
            tries[index] = tries.get(index, 0) + 1
            if tries[index] < TRIES:
                failed.append(index)
            else:
                poison += 1
            looked[worker] = 0  # its successor begins anew
            died = disk + costs.shard * speed[worker] * chance.random()
            heapq.heappush(ready, (died + costs.restart + costs.start * chance.uniform(1.0, 1.5), worker))
            continue
        ends.append(disk + costs.shard * speed[worker] * chance.uniform(0.8, 1.2) + costs.write)
        heapq.heappush(ready, (ends[-1], worker))
    made = max(ends)
    return {
        "wall": made + costs.sign_shard * shards,
        "ideal": costs.shard * shards / workers,
        "tail": made - min(idle),
        "bookkeeping": bookkeeping / shards,
        "signature": costs.sign_shard * shards,
        "given_up": poison,
    }


def table(counts: list[int], shards: int, costs: Costs, trouble: Trouble, repeats: int) -> list[dict[str, float]]:
    """Medians over seeds, by number of workers."""
    rows = []
    for workers in counts:
        runs = [simulate(workers, shards, costs, trouble, seed) for seed in range(repeats)]
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append(
            {
                "workers": workers,
                **row,
                "speed_up": costs.shard * shards / row["wall"],
                "efficiency": row["ideal"] / row["wall"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--shard-seconds", type=float, default=60.0, help="the model's work on one shard")
    parser.add_argument("--start-seconds", type=float, default=90.0, help="queue, import and model of a worker")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--real", default="1,2,4,8", help="numbers of real processes to measure the bookkeeping with; empty: none"
    )
    parser.add_argument("--out")
    options = parser.parse_args()
    measured = [real(int(count), 256, 64, 0.02) for count in options.real.split(",") if count]
    worst = (
        {name: max(row[name] for row in measured) for name in ("write", "bookkeeping", "look", "sign_shard")}
        if measured
        else {}
    )
    costs = Costs(
        options.shard_seconds, options.start_seconds, worst.get("bookkeeping", 0.005), worst.get("look", 0.0005),
        worst.get("write", 0.01), worst.get("sign_shard", 0.001), 5.0,
    )  # fmt: skip
    counts = [int(count) for count in options.workers.split(",")]
    result = {"measured": measured, "costs": costs._asdict(), "simulated": {}}
    for name, trouble in {
        "no trouble": Trouble(0.0, 1.0, 0.0),
        "1 in 20 workers at half speed": Trouble(0.05, 2.0, 0.0),
        "1 in 20 at half speed, 1 shard in 500 kills": Trouble(0.05, 2.0, 0.002),
    }.items():
        result["simulated"][name] = table(counts, options.shards, costs, trouble, options.repeats)
    for row in measured:
        print("real: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    for name, rows in result["simulated"].items():
        print(f"\n{name}: {options.shards} shards of {options.shard_seconds:g} s, start {options.start_seconds:g} s\n")
        print("| workers | wall s | speed-up | efficiency | tail s | bookkeeping ms/shard |\n|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['workers']} | {row['wall']:.0f} | {row['speed_up']:.1f} | {row['efficiency']:.2f} | {row['tail']:.0f} | {1000 * row['bookkeeping']:.1f} |"
            )
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
