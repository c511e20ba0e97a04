"""Benchmark - memory of the stages, for `python -m benchmarks.store --stages`.

Prompts of one short sentence go through sample -> score -> weigh -> train of a SWIFT run; every stage runs in a process
of its own, on one thread, and its peak resident set is measured. What costs no memory for rows is left out: the sampler
is `canned`, the scorer `length`, the passes of reference and teacher give zeros, and of training, what it does with
rows: check, plan, fetch every step's rows in its order, and pack them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._smoke import tiny_model

if TYPE_CHECKING:
    import numpy as np

    from data_contracts.artifact import ArtifactRef
    from data_contracts.store import Store

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
Measured = dict[str, float]
"""CPU seconds and peak MiB of one stage."""
ROOT = Path(__file__).resolve().parents[1]
SHARD = 256
STAGES = ("prompts", "sample", "score", "weigh", "train")
KINDS = {"sample": "generations", "score": "scored_pairs", "weigh": "weighted_pairs"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sample": {"backend": {"name": "canned"}, "num_candidates": 2, "max_new_tokens": 24, "max_prompt_tokens": 64},
    "score": {"scorer": {"name": "length"}, "max_drop_rate": 1.0},
    "weigh": {"weights": {"name": "swift"}, "dtype": "float32"},
}


def measure(stage: str, count: int, directory: Path) -> Measured:
    """Run one stage on what the stage before it left in `directory`; returns CPU seconds and peak memory."""
    import torch  # noqa: F401 - its import is not the stage's cost

    from data_contracts.store import Store

    store, began = Store(directory / "store"), time.process_time()
    if stage == "prompts":
        tiny_model(directory / "model")
        publish(count, store)
    elif stage == "train":
        train(store)
    else:
        build(stage, store, directory / "model")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": time.process_time() - began, "peak_mib": peak}


def publish(count: int, store: Store) -> None:
    """Write the prompts as a run does."""
    import numpy as np

    import tasks.prompts
    from data_contracts.prompts import prompt_row
    from tasks.data.prompt_set import BATCH, PromptSet, batch_of

    def batches() -> Iterator[Any]:
        for start in range(0, count, BATCH):
            numbers = range(start, min(count, start + BATCH))
            texts = (f"Say {number % 9} words about the number {number}." for number in numbers)
            yield batch_of([prompt_row([{"role": "user", "content": text}]) for text in texts])

    tasks.prompts.publish(PromptSet(list(batches()), np.ones((count, 2), np.int64), ["rows"], "row"), store)


def build(stage: str, store: Store, model: Path) -> None:
    """Build the stage's artifact. A pass computes zeros instead of log-probs, and loads no model."""
    from data_contracts.checkpoint import external_model
    from stages.execute import execute
    from stages.models.logps import Pass
    from stages.stage import STAGES as BY_NAME

    Pass._score_within_context = zeros
    stage_inputs = {
        "policy": external_model(model),
        "reference": external_model(model),
        "teacher": external_model(model),
    }
    stage_inputs |= {"prompts": artifact("prompts", store)}
    if stage == "score":
        stage_inputs["generations"] = artifact("generations", store)
    if stage == "weigh":
        stage_inputs["pairs"] = artifact("scored_pairs", store)
    names = {name.rstrip("?") for name in BY_NAME[stage].consumes}
    inputs = {name: ref for name, ref in stage_inputs.items() if name in names}
    per_shard = "pairs_per_shard" if stage == "weigh" else "prompts_per_shard"
    settings = SETTINGS[stage] | {"runtime": {"device": "cpu", per_shard: SHARD}}
    execute(BY_NAME[stage], BY_NAME[stage].load().Config.model_validate(settings), inputs, store)


def zeros(_: Any, rows: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """A log-prob of 0 for every token of these (prompt, response) rows."""
    import numpy as np

    return [np.zeros(len(response), np.float32) for _, response in rows]


def artifact(kind: str, store: Store) -> ArtifactRef:
    """The only artifact of a kind."""
    [record] = [record for record in store.records() if record.kind == kind]
    return record.ref(str(store.directory(kind, record.key)))


def train(store: Store) -> None:
    """What training does with its rows."""
    from stages.methods import METHODS
    from stages.training.batches import collate_rows, micro_batches, plan_steps, row_length
    from stages.training.config import TrainingInputs
    from stages.training.stage import check_rows

    sides = ("chosen", "rejected")
    rows = TrainingInputs(artifact("weighted_pairs", store).path, "").rows()
    check_rows(rows, METHODS.config("swift"))
    for step in plan_steps(len(rows), 64, 1, 0):
        step_rows = rows.pick(step.rows)
        lengths = [row_length(row, sides, True) for row in step_rows]
        for batch in micro_batches(lengths, 4096, 0, 1, True):
            collate_rows([step_rows[i] for i in batch], sides, True)


def show(results: dict[int, dict[str, Measured]]) -> None:
    """Print a line per stage, and one per number of rows."""
    counts = list(results)
    print("\n| stage | " + " | ".join(f"{count} rows: peak MiB, CPU s" for count in counts) + " | growth, GiB |")
    print("|---|" + "---|" * (len(counts) + 1))
    for stage in STAGES[1:]:
        measured = [results[count][stage] for count in counts]
        cells = [f"{result['peak_mib']:.0f}, {result['cpu']:.0f}" for result in measured]
        growth = (measured[-1]["peak_mib"] - measured[0]["peak_mib"]) / 1024
        print(f"| {stage} | " + " | ".join(cells) + f" | {growth:.2f} |")


def measure_all(counts: list[int], parent: Path | None, together: bool = False) -> dict[int, dict[str, Measured]]:
    """Results by number of rows and stage; `together`: one process for all stages, whose peaks then mean nothing."""
    results: dict[int, dict[str, Measured]] = {}
    for count in counts:
        results[count] = {}
        with tempfile.TemporaryDirectory(dir=parent) as directory:
            for stages in [",".join(STAGES)] if together else STAGES:
                command = [sys.executable, "-m", "benchmarks._stages", stages, str(count), directory]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                results[count] |= json.loads(done.stdout.splitlines()[-1])
                print(count, stages, results[count], flush=True)
    return results


if __name__ == "__main__":
    names, rows, root = sys.argv[1:]
    print(json.dumps({name: measure(name, int(rows), Path(root)) for name in names.split(",")}))
