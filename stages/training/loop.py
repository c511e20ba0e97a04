"""Stages - the training loop: blind to method names. Each step: forward, the method's loss, backward, update, log, now and then save."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from data_contracts.errors import ContractError
from stages.lazy import torch
from stages.methods import METHODS
from stages.policy import response_logps
from stages.training.batches import Step, as_pairs, collate_pairs, micro_batches, pair_length, plan_steps
from stages.training.engine import Engine

METRICS = "metrics.jsonl"


def train(config: Any, rows: list[dict[str, Any]], model: str, out: Path, device: str, report: Any) -> dict[str, float]:
    """Train `model` on weighted pairs and export it into `out`; goes on from `out/resume` if an earlier try left a checkpoint there.

    `report(done, total, step metrics)` is called on the main rank after every step. Returns: metrics of the last epoch, averaged.
    """
    steps = plan_steps(len(rows), config.batch_size, config.epochs, config.seed)
    engine = Engine(config, model, len(steps), device)
    resume = out / "resume"
    done = engine.resume(resume)
    log = _Log(out / METRICS, done) if engine.is_main else None
    for step in steps[done:]:
        metrics = _one_step(engine, config, step, rows)
        if log:
            log.append(metrics)
            report(step.number + 1, len(steps), metrics)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics.get("grad_norm", 0.0)):
            pairs = [rows[i]["pair_id"] for i in step.pairs]
            raise ContractError(f"step {step.number}: the loss is {metrics['loss']}, the gradient norm {metrics.get('grad_norm')}; pairs of the step: {pairs[:8]}. Lower training.learning_rate")
        if (step.number + 1) % config.runtime.save_every_steps == 0 and step.number + 1 < len(steps):
            engine.save(resume, step.number + 1)
    engine.export(out / ".export")
    engine.close()
    return log.summary(steps[-1].epoch) if log else {}


def _one_step(engine: Engine, config: Any, step: Step, rows: list[dict[str, Any]]) -> dict[str, float]:
    """One optimizer update. The loss is the mean over the step's pairs, however they are cut into micro-batches and dealt to ranks."""
    began = time.monotonic()
    pairs = [rows[i] for i in step.pairs]
    batches = micro_batches([pair_length(row) for row in pairs], config.runtime.batch_tokens, engine.rank, engine.world_size)
    method = METHODS.get(config.method.name)
    sums: dict[str, Any] = {}
    for number, chosen in enumerate(batches):
        # A rank without work runs a pair of another one, at weight 0: collectives inside the model must meet.
        batch, constants = collate_pairs([pairs[i] for i in chosen or [0]])
        batch = batch.to(engine.engine.device)
        logps = response_logps(engine.model, batch)
        result = method.pair_loss(config.method, as_pairs(logps, batch, constants))
        share = result.loss.sum() / len(pairs) * bool(chosen)
        engine.backward(share, last=number == len(batches) - 1)
        if chosen:
            for name, values in {"loss": result.loss.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
            sums["tokens"] = sums.get("tokens", 0.0) + float(batch.response_mask.sum())
    state = engine.step()
    names = sorted(METRIC_NAMES | sums.keys())
    totals = dict(zip(names, engine.total(torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)).tolist(), strict=True))
    tokens = totals.pop("tokens")
    metrics = {name: value / len(pairs) for name, value in totals.items()}
    return {"step": step.number + 1, "epoch": step.epoch, **metrics, **state, "tokens": tokens, "seconds": time.monotonic() - began}


# Every rank must reduce the same list, also one that had no pair in this step.
METRIC_NAMES = {"loss", "tokens", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}


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
        return {"steps": len(self.lines), "first_loss": self.lines[0]["loss"], "tokens": sum(line["tokens"] for line in self.lines)} | means


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut by a kill
    return lines
