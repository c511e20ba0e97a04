"""Flows - what a run will cost, before it starts: its rehearsal's steps times rates measured on this machine.

What is built already costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from data_contracts import ledger
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.store import Store
from flows.config import RunConfig
from flows.forecast.plan import model_shapes, refuse_what_cannot_fit
from flows.forecast.rates import JUDGED_BENCHMARKS, Rate, calibrate, kind_of, rate_from_records, units_of
from flows.forecast.rehearsal import Rehearsal, Step, rehearse
from flows.preflight import Checked, preflight
from stages.stage import STAGES
from tasks.place import Purpose

OTHER_SECONDS = 16.0
"""Outside all stages, where no earlier run of the store tells: imports, Prefect's server, reports.

Measured in a new store.
"""
MEASURING = (Purpose.HELDOUT, Purpose.CHECKPOINT, Purpose.BASELINE)
GROWING_COSTS = ("tokens_in", "tokens_out", "flops")
PEAKS = ("peak_rss_bytes", "peak_gpu_bytes", "gpus")


UNKNOWN = "unknown"
"""Source of a step that neither records nor a calibration tell."""


class Estimate(NamedTuple):
    """One step, predicted."""

    step: Step
    seconds: float
    spread: float
    """Standard deviation, seconds."""
    cost: dict[str, float]
    source: str
    """built, records, calibration, or unknown."""


class Prediction(NamedTuple):
    run: str
    steps: list[Estimate]
    other: float
    """Seconds outside of all stages."""
    price_per_hour: float | None
    left_out: tuple[str, ...]
    """Benchmarks that no calibration plays."""
    disk_free: int

    @property
    def seconds(self) -> float:
        """Of all that is known; a lower bound if `unknown` names something."""
        return sum(estimate.seconds for estimate in self.steps) + self.other

    @property
    def unknown(self) -> list[str]:
        """Names of the steps that neither records nor a calibration tell."""
        return sorted({estimate.step.name for estimate in self.steps if estimate.source == UNKNOWN})

    @property
    def spread(self) -> float:
        """Half of the 95 % interval.

        Stages of one kind share their rate's error: it is added up within a kind, not averaged away.
        """
        kinds: dict[str, float] = {}
        for estimate in self.steps:
            kinds[estimate.step.name] = kinds.get(estimate.step.name, 0.0) + estimate.spread
        return 1.96 * math.sqrt(sum(value**2 for value in kinds.values()) + (0.3 * self.other) ** 2)


def estimate(
    config: RunConfig, store: Store, price_per_hour: float | None = None, use_calibration: bool = True
) -> Prediction:
    """What a run will cost. `use_calibration`: measure on this machine what the store's records do not tell.

    Raises: ConfigError for a request that the run would refuse, and for one that cannot fit into memory, with what
        would help.
    """
    _refuse_what_cannot_fit(config)
    checked = preflight(config, store)
    rehearsal = rehearse(config, store, checked)
    rates = _rates(rehearsal, store)
    missing = {kind_of(step, rehearsal.start) for step in rehearsal.steps if step.record is None} - rates.keys()
    if use_calibration and missing:
        rates = calibrate(config, checked, store) | rates
    steps = [_predict(step, rates.get(kind_of(step, rehearsal.start)), rehearsal, checked) for step in rehearsal.steps]
    left_out = tuple(name for name in JUDGED_BENCHMARKS if getattr(config.evaluation, name, None) is not None)
    disk_free = shutil.disk_usage(_nearest_existing(store.root)).free
    prediction = Prediction(config.name, steps, _other(store), price_per_hour, left_out, disk_free)
    if not prediction.unknown:  # a lower bound would be held against what the whole run takes
        _write(prediction, store)
    return prediction


def _refuse_what_cannot_fit(config: RunConfig) -> None:
    """Before anything is fetched. A model whose size is not known yet is let through: preflight fetches it."""
    try:
        model_shapes(config)
    except ConfigError:
        return
    refuse_what_cannot_fit(config)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _rates(rehearsal: Rehearsal, store: Store) -> dict[str, Rate]:
    """Rate of each kind of missing step that the store's records tell."""
    missing = [step for step in rehearsal.steps if step.record is None]
    kinds = {STAGES[step.stage].produces for step in missing}
    newest_first = {kind: list(store.records(kind))[::-1] for kind in kinds}
    rates = {}
    for step in missing:
        records = newest_first[STAGES[step.stage].produces]
        candidates = rehearsal.config.sampling.num_candidates
        if rate := rate_from_records(step, records, store, rehearsal.start, candidates):
            rates[kind_of(step, rehearsal.start)] = rate
    return rates


def _predict(step: Step, rate: Rate | None, rehearsal: Rehearsal, checked: Checked) -> Estimate:
    if step.record is not None:
        return Estimate(step, 0.0, 0.0, {}, "built")
    if rate is None:
        return Estimate(step, 0.0, 0.0, {}, UNKNOWN)
    prompts = _num_prompts(step, rehearsal.config, checked, rehearsal.num_prompts)
    units = units_of(step, rehearsal.config, prompts, rate.record.cost.get("pairs_per_prompt", 1.0))
    scale = units / rate.units if rate.units else 1.0
    seconds, measured = rate.fixed + units * rate.per_unit, rate.record.cost
    cost = {name: measured[name] * scale for name in GROWING_COSTS if name in measured}
    cost |= {name: measured[name] for name in PEAKS if name in measured}
    size = sum(file.size for file in rate.record.files)
    cost["bytes"] = size if step.stage == "train" else size * scale
    return Estimate(step, seconds, seconds * rate.spread, cost, rate.source)


def _num_prompts(step: Step, config: RunConfig, checked: Checked, num_prompts: Mapping[str, int]) -> int:
    if step.place.purpose in MEASURING:
        return len(checked.heldout)
    if step.place.purpose is Purpose.WARM_START:
        return len(checked.train)
    ref = step.inputs.get("prompts")
    if ref is not None and num_prompts.get(ref.key):
        return num_prompts[ref.key]
    if config.prompts.per_iteration:
        return config.prompts.per_iteration
    if config.prompts.reuse:
        return len(checked.train)
    return len(checked.train) // config.iterations


def _other(store: Store) -> float:
    """Median seconds that finished sessions of this store spent outside of stages."""
    seconds = []
    for run in store.runs_with(ledger.FILE):
        with contextlib.suppress(ConfigError):  # killed before its first line was whole
            seconds += [
                session.other_seconds for session in ledger.read_account(store, run).sessions if session.is_finished
            ]
    if seconds:
        return statistics.median(seconds)
    return OTHER_SECONDS


def _write(prediction: Prediction, store: Store) -> None:
    """`runs/<name>/estimate.json`, for `selfplay ledger` to set beside what was measured."""
    path = store.run_directory(prediction.run) / ledger.ESTIMATE
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": item.step.place.step, "shown_as": item.step.name, "seconds": item.seconds, "source": item.source}
        for item in prediction.steps
    ]
    total = {"seconds": prediction.seconds, "half_width": prediction.spread, "other": prediction.other, "steps": steps}
    write_atomic(path, json.dumps(total, indent=1) + "\n")


def show(prediction: Prediction) -> str:
    """The prediction as text: a line per step, sums, money, warnings."""
    lines = [
        f"{'step':8} {'stage':22} {'seconds':>9} {'+- 95 %':>8} {'tokens in':>11} {'tokens out':>11} {'TFLOP':>9} "
        f"{'GiB':>6} {'MB':>8}  from"
    ]
    lines += [_step_line(item) for item in prediction.steps]
    disk = sum(item.cost.get("bytes", 0.0) for item in prediction.steps)
    hours, half_hours = prediction.seconds / 3600, prediction.spread / 3600
    bound = "at least " if prediction.unknown else ""
    lines += [
        "",
        f"total: {bound}{prediction.seconds:.0f} s +- {prediction.spread:.0f} s ({hours:.2f} h), of which "
        f"{prediction.other:.0f} s outside the stages; {bound}{disk / 1e9:.2f} GB of disk",
    ]
    if prediction.price_per_hour is not None:
        price = prediction.price_per_hour
        lines.append(f"money: {bound}{hours * price:.2f} +- {half_hours * price:.2f} at {price:g} per hour")
    if disk > prediction.disk_free:
        lines.append(
            f"DISK: {bound}{disk / 1e9:.1f} GB are needed, {prediction.disk_free / 1e9:.1f} GB are free: "
            "training.save_dtype: bfloat16 halves the checkpoints, --store names another disk"
        )
    if prediction.unknown:
        lines.append(
            f"unknown, and in no sum: {', '.join(prediction.unknown)}. Leave out --no-calibrate to have them measured; "
            "this is not kept as a prediction"
        )
    if prediction.left_out:
        lines.append(f"not included, because a calibration would pay a judge for it: {', '.join(prediction.left_out)}")
    return "\n".join(lines)


def _step_line(item: Estimate) -> str:
    """One step's line; of a step that is not known, no number."""
    place = f"{item.step.place.step:8} {item.step.name:22}"
    if item.source == UNKNOWN:
        return f"{place} {UNKNOWN:>9}"
    cost = item.cost
    return (
        f"{place} {item.seconds:9.1f} {1.96 * item.spread:8.1f} "
        f"{cost.get('tokens_in', 0):11,.0f} {cost.get('tokens_out', 0):11,.0f} {cost.get('flops', 0) / 1e12:9.2f} "
        f"{cost.get('peak_rss_bytes', 0) / 2**30:6.2f} {cost.get('bytes', 0) / 1e6:8.1f}  {item.source}"
    )
