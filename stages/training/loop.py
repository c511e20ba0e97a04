"""Stages - the training loop, which knows no method's name: forward, the method's loss, backward, update, log, save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.shard_rows import ShardRows
from stages.models.lazy import torch
from stages.running.cost import loading
from stages.running.gpus import report_rank
from stages.training.bad_step import BadStep, what_is_wrong
from stages.training.batches import (
    MARGIN_AT_STEP_1,
    METRICS,
    STEPS,
    OptimizerStep,
    WeightedPair,
    kept_steps,
    micro_batches,
    plan_steps,
    row_length,
)
from stages.training.engine import Engine
from stages.training.speed import SPEEDS, Speed, mean_speed, sequence_tokens, train_flops
from stages.training.streams import ABSOLUTE_MARGIN, Streams

if TYPE_CHECKING:
    from torch import Tensor

    from stages.training.config import TrainingConfig

Metrics = dict[str, float]
Report = Callable[[int, int, Metrics], None]
"""(steps done, steps in all, metrics of the step)."""


def train(
    config: TrainingConfig,
    rows: ShardRows,
    policy: str,
    reference: str | None,
    teacher: str | None,
    out: Path,
    device: str,
    report: Report,
    start: str | None = None,
) -> Metrics:
    """Train `policy` on weighted pairs and export it into `out`. `start`: the base of the policy's adapter, if any.

    Resumes from `out/resume` if an earlier try saved a checkpoint there. The main rank calls `report` after every step.
    Returns: metrics of the last epoch, averaged. Raises: BadStep if a step's numbers are wrong.
    """
    steps = plan_steps(len(rows), config.batch_size, config.epochs, config.seed)
    with loading():
        engine = Engine(config, policy, len(steps), device, start)
        streams = Streams(config, engine, reference, teacher)
    resume, export_steps = out / "resume", kept_steps(len(steps), config.checkpoints)
    resumed_from = engine.resume(resume)
    log = _Log(out / METRICS, resumed_from) if engine.is_main else None
    speed = Speed(policy, config.dtype, device, engine.world_size, train_flops(config))
    clock = SaveClock(config.runtime.save_every_seconds, config.runtime.save_every_steps)
    for step in steps[resumed_from:]:
        num_steps = step.number + 1
        # The main rank's clock decides for all: the checkpoint is a collective operation.
        asks = engine.is_main and clock.is_due(num_steps)
        step_rows = rows.pick(step.rows)
        metrics, is_save_due = one_step(engine, streams, config, step, step_rows, asks)
        metrics |= speed.of(sequence_tokens(step_rows, streams.sides), metrics["seconds"])
        if log:
            log.append(metrics)
            report(num_steps, len(steps), metrics)
        if problem := what_is_wrong(metrics, len(step.rows)):
            raise BadStep(problem, step, metrics, resumed_from)
        # Before the state to resume from: after a kill in between, the next try exports the checkpoint again.
        if num_steps in export_steps:
            engine.export(out / STEPS / f"{num_steps:06d}")
        if is_save_due and num_steps < len(steps):
            engine.save(resume, num_steps)
            clock.saved()
    engine.export(out / ".export")
    if engine.world_size > 1:  # a single rank is the stage's own process, which reports for itself
        report_rank(out)
    engine.close()
    if log:
        return log.summary(steps[-1].epoch)
    return {}


class SaveClock:
    """When a checkpoint to resume from is due: after so many seconds since the last one, or every so many steps."""

    def __init__(self, seconds: float, steps: int | None):
        self.seconds, self.steps = seconds, steps
        self.saved()

    def saved(self) -> None:
        """Start counting the seconds anew."""
        self.last = time.monotonic()

    def is_due(self, num_steps: int) -> bool:
        """Return whether to save now, after `num_steps` steps."""
        by_steps = self.steps is not None and num_steps % self.steps == 0
        return by_steps or time.monotonic() - self.last >= self.seconds


def one_step(
    engine: Engine,
    streams: Streams,
    config: TrainingConfig,
    step: OptimizerStep,
    rows: list[WeightedPair],
    asks_to_save: bool = False,
) -> tuple[Metrics, bool]:
    """Do one optimizer update; returns its metrics, and whether any rank asks to save.

    Metrics are means over the step's rows, but for `tokens`, their sum. The loss is the mean over the rows (and tokens)
    of the step, however they are cut into micro-batches and dealt. All numbers stay on the device until the update is
    under way, and are read at once: the host packs the next micro-batch while the device works.
    """
    began = time.monotonic()
    partners = rows[1:] + rows[:1]  # whose response a mismatched pair borrows: the step's rows, rotated by one
    streams.sample_anchors(rows, step.number)
    engine.seed_dropout(step.number)
    packed = streams.packs(rows)
    lengths = [row_length(row, streams.sides, packed) for row in rows]
    batches = micro_batches(lengths, config.runtime.batch_tokens, engine.rank, engine.world_size, packed)
    constants = _step_constants(engine, streams, rows, partners, batches)
    num_tokens = streams.token_count(rows)
    sums: dict[str, Tensor] = {}
    for number, batch_rows in enumerate(batches):
        # A rank without work runs another rank's row at weight 0: collectives inside the model must meet.
        indices = batch_rows or [0]
        result = streams.loss([rows[i] for i in indices], [partners[i] for i in indices], constants)
        engine.backward(result.share(len(rows), num_tokens) * bool(batch_rows), last=number == len(batches) - 1)
        values = {name: values.double().sum() for name, values in result.metrics.items()}
        values["loss"] = result.share(1, num_tokens / len(rows)).detach().double()
        _add(sums, values, is_counted=bool(batch_rows))
    learning_rate, norm = engine.step()
    names = sorted(sums)
    totals = engine.total([sums[name] for name in names] + [float(asks_to_save)])
    *means, votes, norm = _read([*(total / len(rows) for total in totals[:-1]), totals[-1], norm])
    metrics = {"step": step.number + 1, "epoch": step.epoch, **dict(zip(names, means, strict=True))}
    metrics["learning_rate"] = learning_rate
    if norm is not None:
        metrics["grad_norm"] = norm
    metrics["rows"] = float(len(rows))
    metrics["tokens"] = float(sum(len(row[f"{side}_ids"]) for row in rows for side in streams.sides))
    metrics["seconds"] = time.monotonic() - began
    return metrics, bool(votes)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], is_counted: bool) -> None:
    """Add values to sums by name, on the device; a rank without work adds zeros, for the names."""
    for name, value in values.items():
        value = value if is_counted else torch.zeros_like(value)
        sums[name] = sums[name] + value if name in sums else value


def _read(values: list[Tensor | float | None]) -> list[Any]:
    """The values as numbers, by one copy from the device; None stays None."""
    on_device = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = iter(torch.stack([value.double() for value in on_device]).tolist() if on_device else ())
    return [next(numbers) if isinstance(value, torch.Tensor) else value for value in values]


def _step_constants(
    engine: Engine,
    streams: Streams,
    rows: list[WeightedPair],
    partners: list[WeightedPair],
    batches: list[list[int]],
) -> dict[str, Tensor]:
    """Means over the whole step that the loss treats as constants (KTO's z0): a pass before the one with gradients."""
    sums: dict[str, Tensor] = {}
    for batch_rows in batches:
        indices = batch_rows or [0]
        values = streams.step_values([rows[i] for i in indices], [partners[i] for i in indices])
        _add(sums, values, is_counted=bool(batch_rows))
    names = sorted(sums)
    if not names:
        return {}
    totals = engine.total([sums[name] for name in names])
    return {name: total / len(rows) for name, total in zip(names, totals, strict=True)}


class _Log:
    """metrics.jsonl: one line per step. A resumed try first drops the lines of the steps that it will do again."""

    def __init__(self, path: Path, num_steps: int):
        self.path = path
        self.lines = [line for line in _read_lines(path) if line["step"] <= num_steps]
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def append(self, metrics: Metrics) -> None:
        self.lines.append(metrics)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def summary(self, epoch: int) -> Metrics:
        """The means over an epoch, with the number of steps, the first loss, the tokens and the speed of all steps."""
        last = [line for line in self.lines if line["epoch"] == epoch]
        not_means = ("step", "epoch", "rows", "tokens", "seconds", *SPEEDS)
        names = [name for name in self.lines[0] if name not in not_means]
        means = {name: sum(line[name] for line in last if name in line) / len(last) for name in names}
        return {
            "steps": len(self.lines),
            "first_loss": self.lines[0]["loss"],
            "tokens": sum(line["tokens"] for line in self.lines),
            **({MARGIN_AT_STEP_1: self.lines[0][ABSOLUTE_MARGIN]} if ABSOLUTE_MARGIN in self.lines[0] else {}),
        } | {**means, **mean_speed(self.lines)}


def _read_lines(path: Path) -> list[Metrics]:
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut by a kill
    return lines
