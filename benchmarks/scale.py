"""Benchmark - scale: sharded stages with 1 to 256 workers, simulated: throughput, tail and overhead.

    python -m benchmarks.scale [--workers 1,2,4,...,256] [--shards 1024] [--out FILE.json]
    python -m benchmarks.scale --smoke

Two parts. The first runs the real thing: N processes (`--real`) claim, write and sign shards of one artifact on this
machine's disk, models replaced by a sleep; it measures what a claim, a shard and a signature cost. The simulation then
plays the claims' own order of work (begin apart, failed shards last, two tries) with those costs on 1-256 workers, with
stragglers and failures, thousands of times faster than time. The store serialises what a shared file system serialises:
the metadata operations of claims.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from benchmarks._smoke import add_smoke
from data_contracts.artifact import ArtifactRecord
from data_contracts.shards import shard_is_whole, shard_path, to_table, write_shard
from data_contracts.store import Store
from stages.running.claims import TRIES, Claims, forget


class Costs(NamedTuple):
    """Seconds, measured or assumed."""

    shard: float
    """Making one shard: the model's work."""
    start: float
    """From a worker's request to its first shard: queue, process, import, model."""
    claim: float
    """Opening, locking and recording one claim."""
    look: float
    """Seeing that a shard is taken or done."""
    write: float
    """Writing a shard, with its flush to disk."""
    sign_shard: float
    """Digesting one shard at the signature."""
    restart: float
    """From a worker's death to the request for its successor."""


class Trouble(NamedTuple):
    """What goes wrong, at random."""

    straggler_rate: float
    """Share of the workers that are slow."""
    straggler_factor: float
    """How many times as long a slow worker takes."""
    failure_rate: float
    """Chance that a shard kills its worker."""


def shard_table(directory: Path, rows: int) -> pa.Table:
    """Make an artifact's empty directory; returns the table that each of its shards will hold."""
    directory.mkdir(parents=True)
    row = dict.fromkeys(("response", "chosen", "rejected")) | {
        "messages": [{"role": "user", "content": "x" * 200}],
        "checks": "[]",
        "source": "scale",
    }
    return to_table([row | {"prompt_id": f"p{number}"} for number in range(rows)], "prompts")


class Worked(NamedTuple):
    """What one worker did."""

    seconds: float
    writing: float
    """Seconds of them spent in writing shards."""
    shards: int


def real(workers: int, shards: int, rows: int, sleep: float) -> dict[str, float]:
    """The real store and claims on this disk: seconds of bookkeeping per shard."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCALE_DIRECTORY")) as root:
        store, key = Store(Path(root) / "store"), "0" * 16
        directory = store.directory("prompts", key)
        table = shard_table(directory, rows)

        def is_done(index: int) -> bool:
            return shard_is_whole(shard_path(directory, index), "prompts")

        def work(number: int) -> Worked:
            writing, made, began = 0.0, 0, time.monotonic()
            for index in Claims(directory, f"{number}/{workers}").share("part", shards, is_done, str):
                time.sleep(sleep)
                start = time.monotonic()
                write_shard(shard_path(directory, index), table)
                writing += time.monotonic() - start
                made += 1
            return Worked(time.monotonic() - began, writing, made)

        began = time.monotonic()
        results = _forked(work, workers)
        wall = time.monotonic() - began
        start = time.monotonic()
        # Everything is done: one look at each shard.
        assert not list(Claims(directory, "0/1").share("part", shards, lambda index: False, str))
        look = (time.monotonic() - start) / shards
        forget(directory)
        start = time.monotonic()
        record = ArtifactRecord(
            kind="prompts",
            key=key,
            stage="scale",
            version="1",
            config={},
            inputs={},
            content="",
            files=[],
            rows=shards * rows,
        )
        signed = store.sign(record)
        assert len(signed.files) == shards == sum(result.shards for result in results)
        busy, writing = sum(result.seconds for result in results), sum(result.writing for result in results)
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


def _forked(work: Callable[[int], Worked], count: int) -> list[Worked]:
    """Results of `count` forked workers, through pipes."""
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
    return [Worked(*json.loads(os.read(reader, 4096))) for reader in readers]


def simulate(workers: int, shards: int, costs: Costs, trouble: Trouble, seed: int) -> dict[str, float]:
    """One stage, in seconds: when it is signed, how long its last shards were waited for, the bookkeeping per shard.

    The claims are taken in the order of stages/running/claims.py: each worker begins at its own shard and passes over
    what is taken; a shard that killed its worker is made after all others, and given up after two tries; a lost worker
    is replaced. Claims go through the file system one at a time.
    """
    chance = random.Random(seed)
    speed = [trouble.straggler_factor if chance.random() < trouble.straggler_rate else 1.0 for _ in range(workers)]
    taken: set[int] = set()
    failed: list[int] = []
    tries: dict[int, int] = {}
    next_shard = [worker * shards // workers for worker in range(workers)]
    looked = [0] * workers
    # (time, worker); a file system that does one metadata operation at a time is free again at `disk`.
    ready = [(costs.start * chance.uniform(1.0, 1.5), worker) for worker in range(workers)]
    heapq.heapify(ready)
    disk = bookkeeping = 0.0
    ends: list[float] = []
    idle: list[float] = []
    given_up = 0
    while ready:
        now, worker = heapq.heappop(ready)
        passed, index = 0, None
        while looked[worker] < shards and index is None:
            candidate = next_shard[worker]
            next_shard[worker] = (candidate + 1) % shards
            looked[worker] += 1
            if candidate in taken:
                passed += 1
            else:
                index = candidate
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
                given_up += 1
            looked[worker] = 0  # its successor begins anew
            died = disk + costs.shard * speed[worker] * chance.random()
            heapq.heappush(ready, (died + costs.restart + costs.start * chance.uniform(1.0, 1.5), worker))
            continue
        ends.append(disk + costs.shard * speed[worker] * chance.uniform(0.8, 1.2) + costs.write)
        heapq.heappush(ready, (ends[-1], worker))
    return {
        "wall": max(ends) + costs.sign_shard * shards,
        "ideal": costs.shard * shards / workers,
        "tail": max(ends) - min(idle),
        "bookkeeping": bookkeeping / shards,
        "signature": costs.sign_shard * shards,
        "given_up": given_up,
    }


def table(counts: list[int], shards: int, costs: Costs, trouble: Trouble, repeats: int) -> list[dict[str, float]]:
    """Medians over seeds, by number of workers."""
    rows = []
    for workers in counts:
        runs = [simulate(workers, shards, costs, trouble, seed) for seed in range(repeats)]
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        speed_up, efficiency = costs.shard * shards / row["wall"], row["ideal"] / row["wall"]
        rows.append({"workers": workers, **row, "speed_up": speed_up, "efficiency": efficiency})
    return rows


TROUBLES = {
    "no trouble": Trouble(0.0, 1.0, 0.0),
    "1 in 20 workers at half speed": Trouble(0.05, 2.0, 0.0),
    "1 in 20 at half speed, 1 shard in 500 kills": Trouble(0.05, 2.0, 0.002),
}
ASSUMED = {"write": 0.01, "bookkeeping": 0.005, "look": 0.0005, "sign_shard": 0.001}
"""Seconds, where nothing is measured (--real '')."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--workers", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--shard-seconds", type=float, default=60.0, help="the model's work on one shard")
    parser.add_argument("--start-seconds", type=float, default=90.0, help="queue, import and model of a worker")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--real", default="1,2,4,8", help="numbers of real processes that measure the bookkeeping; empty: none"
    )
    parser.add_argument("--real-shards", type=int, default=256)
    parser.add_argument("--out", type=Path)
    add_smoke(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.workers, options.shards, options.repeats, options.real, options.real_shards = "1,4", 32, 2, "2", 8
    return options


def show(result: dict, options: argparse.Namespace) -> None:
    """Print what was measured, then a table for each kind of trouble."""
    for row in result["measured"]:
        print("real: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    for name, rows in result["simulated"].items():
        print(f"\n{name}: {options.shards} shards of {options.shard_seconds:g} s, start {options.start_seconds:g} s\n")
        print("| workers | wall s | speed-up | efficiency | tail s | bookkeeping ms/shard |\n|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['workers']} | {row['wall']:.0f} | {row['speed_up']:.1f} | {row['efficiency']:.2f} "
                f"| {row['tail']:.0f} | {1000 * row['bookkeeping']:.1f} |"
            )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    measured = [real(int(count), options.real_shards, 64, 0.02) for count in options.real.split(",") if count]
    seconds = {name: max((row[name] for row in measured), default=default) for name, default in ASSUMED.items()}
    costs = Costs(
        shard=options.shard_seconds,
        start=options.start_seconds,
        claim=seconds["bookkeeping"],
        look=seconds["look"],
        write=seconds["write"],
        sign_shard=seconds["sign_shard"],
        restart=5.0,
    )
    counts = [int(count) for count in options.workers.split(",")]
    simulated = {
        name: table(counts, options.shards, costs, trouble, options.repeats) for name, trouble in TROUBLES.items()
    }
    result = {"measured": measured, "costs": costs._asdict(), "simulated": simulated}
    show(result, options)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
