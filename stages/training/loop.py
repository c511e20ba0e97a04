"""Stages - the training loop: blind to method names. Each step: forward, the method's loss, backward, update, log, now and then save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_contracts.shards import ShardRows
from stages.running.cost import loading
from stages.training.bad_step import BadStep, what_is_wrong
from stages.training.batches import STEPS, Step, kept_steps, micro_batches, plan_steps, row_length
from stages.training.engine import Engine
from stages.training.streams import Streams

METRICS = "metrics.jsonl"
Report = Callable[[int, int, dict[str, float]], None]


def train(
    config: Any,
    rows: ShardRows,
    policy: str,
    reference: str | None,
    teacher: str | None,
    out: Path,
    device: str,
    report: Report,
) -> dict[str, float]:
    """Train `policy` on weighted pairs and export it into `out`; goes on from `out/resume` if an earlier try left a checkpoint there.

    `report(done, total, step metrics)` is called on the main rank after every step. Returns: metrics of the last epoch, averaged.
    Raises: BadStep where the numbers go wrong.
    """
    steps = plan_steps(len(rows), config.batch_size, config.epochs, config.seed)
    with loading():
        engine = Engine(config, policy, len(steps), device)
        streams = Streams(config, engine, reference, teacher)
    resume, kept = out / "resume", kept_steps(len(steps), config.checkpoints)
    done = engine.resume(resume)
    log = _Log(out / METRICS, done) if engine.is_main else None
    for step in steps[done:]:
        metrics = one_step(engine, streams, config, step, rows.pick(step.rows))
        if log:
            log.append(metrics)
            report(step.number + 1, len(steps), metrics)
        if wrong := what_is_wrong(metrics, len(step.rows)):
            raise BadStep(wrong, step, metrics, done)
        if step.number + 1 in kept:  # before the state to resume from: a kill in between makes it again
            engine.export(out / STEPS / f"{step.number + 1:06d}")
        if (step.number + 1) % config.runtime.save_every_steps == 0 and step.number + 1 < len(steps):
            engine.save(resume, step.number + 1)
    engine.export(out / ".export")
    engine.close()
    return log.summary(steps[-1].epoch) if log else {}


def one_step(engine: Engine, streams: Streams, config: Any, step: Step, rows: list[dict[str, Any]]) -> dict[str, float]:
    """One optimizer update. Its loss is the mean over the step's rows (and tokens), however they are cut up and dealt to ranks."""
    began = time.monotonic()
    partners = rows[1:] + rows[:1]  # of a mismatched pair: the step's rows, rotated by one
    streams.sample_anchors(rows, step.number)
    lengths = [row_length(row, streams.sides, streams.packed) for row in rows]
    batches = micro_batches(lengths, config.runtime.batch_tokens, engine.rank, engine.world_size, streams.packed)
    constants = _step_constants(engine, streams, rows, partners, batches)
    num_tokens = streams.token_count(rows)
    sums: dict[str, float] = {"tokens": 0.0}
    for number, chosen in enumerate(batches):
        # A rank without work runs a row of another one at weight 0: collectives inside the model must meet.
        picked = chosen or [0]
        result, batch = streams.loss([rows[i] for i in picked], [partners[i] for i in picked], constants)
        engine.backward(result.share(len(rows), num_tokens) * bool(chosen), last=number == len(batches) - 1)
        for name, values in result.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(values.double().sum()) * bool(chosen)
        sums["loss"] = sums.get("loss", 0.0) + float(result.share(1, num_tokens / len(rows)).detach()) * bool(chosen)
        sums["tokens"] += float(batch.response_mask.sum()) * bool(chosen)
    state = engine.step()
    names = sorted(sums)
    totals = dict(zip(names, engine.total([sums[name] for name in names]), strict=True))
    tokens = totals.pop("tokens")
    metrics = {name: value / len(rows) for name, value in totals.items()}
    return {
        "step": step.number + 1,
        "epoch": step.epoch,
        **metrics,
        **state,
        "tokens": tokens,
        "seconds": time.monotonic() - began,
    }


def _step_constants(
    engine: Engine, streams: Streams, rows: list[Any], partners: list[Any], batches: list[list[int]]
) -> dict[str, float]:
    """Means over the whole step that the method's loss treats as constants (KTO's z0): a pass before the first one with gradient."""
    sums: dict[str, float] = {}
    for chosen in batches:
        picked = chosen or [0]
        for name, value in streams.step_values([rows[i] for i in picked], [partners[i] for i in picked]).items():
            sums[name] = sums.get(name, 0.0) + value * bool(chosen)
    names = sorted(sums)
    totals = engine.total([sums[name] for name in names]) if names else []
    return {name: total / len(rows) for name, total in zip(names, totals, strict=True)}


class _Log:
    """metrics.jsonl: one line per step. A resumed try first forgets the steps that it will do again."""

    def __init__(self, path: Path, done: int):
        self.path = path
        self.lines = [line for line in _read_lines(path) if line["step"] <= done]
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def append(self, metrics: dict[str, float]) -> None:
        self.lines.append(metrics)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def summary(self, epoch: int) -> dict[str, float]:
        last = [line for line in self.lines if line["epoch"] == epoch]
        names = [name for name in self.lines[0] if name not in ("step", "epoch", "tokens", "seconds")]
        means = {name: sum(line[name] for line in last if name in line) / len(last) for name in names}
        return {
            "steps": len(self.lines),
            "first_loss": self.lines[0]["loss"],
            "tokens": sum(line["tokens"] for line in self.lines),
        } | means


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut by a kill
    return lines
