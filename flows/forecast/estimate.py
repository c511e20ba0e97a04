"""Flows - what a run will cost before it is started: its steps on paper (flows/forecast/rehearsal.py), and rates measured on this machine.

    seconds(step) = fixed + units x seconds per unit

units: candidates (sample, score), pairs (weigh), pairs x epochs (train), held-out answers and questions (evaluate). The rates come from the
store's own records of such a step on this host if there are any, else from a calibration: the run's own stages on CALIBRATION_PROMPTS
prompts, in a store of its own (`<store>/calibration`), once. What is built already costs nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts import ledger
from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from data_contracts.store import Store, write_atomic
from flows.config import RunConfig
from flows.forecast.plan import model_shapes, refuse_what_cannot_fit
from flows.forecast.rehearsal import Step, rehearse
from flows.preflight import Checked, preflight
from flows.self_play import HANDS, Hands, models_of, play
from stages.running.cost import parameters
from stages.stage import STAGES, events
from tasks.build import Built, build
from tasks.prompts import publish
from tasks.stages import Place

CALIBRATION_PROMPTS = 32
CALIBRATION_QUESTIONS = 10
"""Of each lm-eval task."""
NOISE = 0.10
"""Relative spread of one stage's seconds between equal runs, at least: a machine is never quite the same. Measured: docs/costs.md."""
OTHER_SECONDS = 16.0
"""Outside all stages, where no earlier run of the store tells: imports, Prefect's server, reports. Measured in a new store."""
FIXED_EVALUATION = ("mt_bench", "alpaca_eval", "arena_hard")
"""Parts of `evaluation` that ask judges: left out of a calibration, because judges cost money."""


class Rate(NamedTuple):
    """What one kind of step takes on this machine."""

    fixed: float
    per_unit: float
    spread: float
    """Relative standard deviation of the seconds."""
    units: float
    record: ArtifactRecord
    source: str


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
    price_per_hour: float | None
    left_out: tuple[str, ...]
    disk_free: int

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.steps) + self.other

    @property
    def spread(self) -> float:
        """Half of the 95 % interval. Stages of one kind share their rate's error: it is added up within a kind, not averaged away."""
        kinds: dict[str, float] = {}
        for one in self.steps:
            kinds[one.step.shown_as] = kinds.get(one.step.shown_as, 0.0) + one.spread
        return 1.96 * math.sqrt(sum(value**2 for value in kinds.values()) + (0.3 * self.other) ** 2)


def estimate(
    config: RunConfig, store: Store, price_per_hour: float | None = None, calibrate: bool = True
) -> Prediction:
    """Raises: ConfigError for a request that the run would refuse, and for one that cannot fit into memory, with what would help."""
    _refuse_what_cannot_fit(config)
    checked = preflight(config, store)
    rehearsal = rehearse(config, store, checked)
    missing = [one for one in rehearsal.steps if one.record is None]
    known = {kind: list(store.records(kind))[::-1] for kind in {STAGES[one.stage].produces for one in missing}}
    rates = {}
    for one in missing:
        if rate := _from_records(one, known[STAGES[one.stage].produces], store, rehearsal.start):
            rates[_kind(one, rehearsal.start)] = rate
    if calibrate and {_kind(one, rehearsal.start) for one in missing} - rates.keys():
        rates = _calibrate(config, checked, store) | rates
    steps = [
        _predict(one, rates.get(_kind(one, rehearsal.start)), config, checked, rehearsal.num_prompts)
        for one in rehearsal.steps
    ]
    left_out = tuple(name for name in FIXED_EVALUATION if getattr(config.evaluation, name, None) is not None)
    prediction = Prediction(
        config.name, steps, _other(store), price_per_hour, left_out, shutil.disk_usage(_existing(store.root)).free
    )
    _keep(prediction, store)
    return prediction


def _refuse_what_cannot_fit(config: RunConfig) -> None:
    """Before anything is fetched. A model whose size nobody knows yet is let through: preflight fetches it."""
    try:
        model_shapes(config)
    except ConfigError:
        return
    refuse_what_cannot_fit(config)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _kind(step: Step, start: ArtifactRef) -> str:
    """Steps that cost alike. A weigh stage whose policy is the start model finds its pass among the scores' fluency floors; checkpoints from the
    middle of a training are measured as its last one is."""
    if step.shown_as.startswith("checkpoint_"):
        return "heldout_generations" if step.stage == "sample" else "evaluate"
    if step.stage == "weigh":
        fresh = any(ref.content == start.content for name, ref in step.inputs.items() if name == "policy")
        return f"{step.shown_as} (first)" if fresh else step.shown_as
    return step.shown_as


def _units(step: Step, config: RunConfig, num_prompts: int, pairs_per_prompt: float) -> float:
    if step.stage in ("sample", "evaluate"):
        return num_prompts * (
            step.config.num_candidates if step.stage == "sample" else config.sampling_for_heldout().num_candidates
        )
    if step.stage == "score":
        return num_prompts * config.sampling.num_candidates
    pairs = num_prompts * pairs_per_prompt * (2 if "more_pairs" in step.inputs else 1)
    return pairs * (step.config.epochs if step.stage == "train" else 1)


def _predict(
    step: Step, rate: Rate | None, config: RunConfig, checked: Checked, num_prompts: Mapping[str, int]
) -> Estimate:  # fmt: skip
    if step.record is not None:
        return Estimate(step, 0.0, 0.0, {}, "built")
    if rate is None:
        return Estimate(step, 0.0, 0.0, {}, "unknown")
    prompts = _prompts_of(step, config, checked, num_prompts)
    units = _units(step, config, prompts, rate.record.cost.get("pairs_per_prompt", 1.0))
    scale = units / rate.units if rate.units else 1.0
    seconds = rate.fixed + units * rate.per_unit
    cost = {
        name: value * scale for name, value in rate.record.cost.items() if name in ("tokens_in", "tokens_out", "flops")
    }
    size = sum(file.size for file in rate.record.files)
    cost["bytes"] = size * (1.0 if step.stage == "train" else scale)
    cost |= {
        name: rate.record.cost[name]
        for name in ("peak_rss_bytes", "peak_gpu_bytes", "gpus")
        if name in rate.record.cost
    }
    return Estimate(step, seconds, seconds * rate.spread, cost, rate.source)


def _prompts_of(step: Step, config: RunConfig, checked: Checked, num_prompts: Mapping[str, int]) -> int:
    if step.stage == "evaluate" or step.shown_as.endswith("heldout_generations"):
        return len(checked.heldout)
    ref = step.inputs.get("prompts")
    if ref is not None and num_prompts.get(ref.key):
        return num_prompts[ref.key]
    share = len(checked.train) if config.prompts.reuse else len(checked.train) // config.iterations
    return config.prompts.per_iteration or share


def _from_records(step: Step, records: Sequence[ArtifactRecord], store: Store, start: ArtifactRef) -> Rate | None:
    """The first of the records that is of this host, and of the same stage, settings (seeds apart) and size of model: what it took, as it is."""
    # A checkpoint that is to be trained will have as many parameters as the one it starts from.
    inputs = [start if ref.kind == "checkpoint" and not ref.path else ref for ref in step.inputs.values()]
    wanted, size = _unseeded(step.config), _size(inputs)
    for record in records:
        like = (record.version == STAGES[step.stage].version and record.provenance.get("host") == platform.node()
                and record.config is not None and _unseeded_dict(record.config) == wanted and _size(record.inputs.values()) == size
                and record.inputs.keys() == step.inputs.keys() and record.provenance.get("starts", 1) == 1)  # fmt: skip
        if like and (step.stage != "weigh" or record.cost.get("tokens_in", 0) > 0):
            units = _measured_units(record, step.config)
            cost = record.cost | {"pairs_per_prompt": 1.0}
            return _rate(
                record.model_copy(update={"cost": cost}), store, units, record.seconds["wall"] + 0.5, "records"
            )
    return None


def _unseeded(config: Config) -> dict[str, Any]:
    return _unseeded_dict(config.identity())


def _unseeded_dict(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in ("seed", "learning_rate")}


def _size(inputs: Iterable[ArtifactRef]) -> tuple[int, ...]:
    """Parameters of the models a step reads."""
    return tuple(sorted({parameters(ref.path) for ref in inputs if ref.kind == "checkpoint"}))


def _measured_units(record: ArtifactRecord, config: Any) -> float:
    metrics = record.metrics
    if record.stage == "sample":
        return metrics["candidates"]
    if record.stage == "train":
        return max(1.0, metrics.get("steps", 1) * config.batch_size)
    if record.stage == "evaluate":
        return max(1.0, record.rows)
    return max(1.0, metrics.get("pairs", record.rows))


def _rate(record: ArtifactRecord, store: Store, units: float, wall: float, source: str) -> Rate:
    """Split a measured step into what it takes once (importing, loading, exporting) and what each unit takes.

    A training's first step is a warm-up, so its rate is the median of the others; sampling counts the seconds of generating.
    """
    seconds, spread, lengths = record.seconds, 0.0, 0.0
    per_unit = seconds.get("busy", 0.0) / units
    if record.stage == "sample":
        per_unit = seconds.get("generate", seconds.get("busy", 0.0)) / units
        lengths = 0.5 / math.sqrt(units)  # how long answers are is itself an estimate, from so many of them
    elif record.stage == "train":
        history = events(store.directory(record.kind, record.key))
        times = [event["time"] for event in history if event["event"] == "step"]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        if gaps:
            per_unit = statistics.median(gaps) / (units / len(times))
            spread = statistics.pstdev(gaps) / statistics.mean(gaps) / math.sqrt(len(gaps))
    per_unit = min(per_unit, wall / units)
    return Rate(wall - per_unit * units, per_unit, math.sqrt(NOISE**2 + spread**2 + lengths**2), units, record, source)


def _calibrate(config: RunConfig, checked: Checked, store: Store) -> dict[str, Rate]:
    """Play the first iteration on a few prompts with the real stages, and read its records."""
    small = _small(config)
    root = Store(store.root / "calibration")
    few = Checked(checked.train[:CALIBRATION_PROMPTS], checked.heldout[:CALIBRATION_PROMPTS], small.evaluation.model_copy(
        update={"lm_eval": tuple(task.model_copy(update={"limit": min(task.limit or CALIBRATION_QUESTIONS, CALIBRATION_QUESTIONS)}) for task in checked.evaluation.lm_eval)}
    ))  # fmt: skip
    start, models = models_of(small, root)
    measurer = _Measurer(small, root, start, few, checked)
    hands = Hands(measurer.run, lambda rows, place, shown_as="": publish(rows, root), HANDS.read_answers)
    with contextlib.suppress(_Enough):
        play(small, few, Place(str(root.root), small.name, "iter_00"), start, models, measurer, hands=hands)
    return measurer.rates


def _small(config: RunConfig) -> RunConfig:
    """The run, with few prompts, and enough steps to tell the steady speed from the first one's."""
    prompts = config.prompts.model_copy(update={"per_iteration": CALIBRATION_PROMPTS, "reuse": True})
    training = config.training.model_copy(
        update={
            "epochs": max(config.training.epochs, 3),
            "batch_size": min(config.training.batch_size, CALIBRATION_PROMPTS),
            "checkpoints": (),
        }
    )
    evaluation = config.evaluation.model_copy(
        update={name: None for name in FIXED_EVALUATION if hasattr(config.evaluation, name)}
        | {"suites": (), "tournament": None}
    )
    return config.model_copy(
        update={
            "iterations": 2, "prompts": prompts, "training": training,
            "evaluation": evaluation, "mix_previous": False, "scoring": config.scoring.model_copy(update={"max_drop_rate": 1.0}),
        }
    )  # fmt: skip


class _Enough(Exception):
    """Everything was measured that will be asked for."""


class _Measurer:
    """Hands that build for real, and a history that listens."""

    def __init__(self, config: RunConfig, store: Store, start: ArtifactRef, checked: Checked, whole: Checked):
        self.config, self.store, self.start, self.checked, self.whole = config, store, start, checked, whole
        self.rates: dict[str, Rate] = {}
        self.made: dict[str, Built] = {}
        self.pairs_per_prompt = 1.0

    def run(
        self, stage: str, config: Config, place: Place, shown_as: str | None = None, **inputs: ArtifactRef
    ) -> Built:
        step = Step(stage, config, place.step, shown_as or stage, inputs, None, None)
        kind = _kind(step, self.start)
        if step.shown_as in self.made and kind in self.rates:
            return self.made[step.shown_as]  # measured: stands for the next one of its kind
        began = time.monotonic()
        built = build(stage, config, inputs, self.store, log=lambda text: None)
        took = time.monotonic() - began if not built.cached else built.record.seconds["wall"] + 0.5
        if stage == "score":
            self.pairs_per_prompt = built.record.metrics["pairs"] / max(1, len(self.checked.train))
        record = built.record.model_copy(
            update={"cost": built.record.cost | {"pairs_per_prompt": self.pairs_per_prompt}}
        )
        prompts = len(
            self.checked.heldout
            if str(shown_as).endswith("heldout_generations") or stage == "evaluate"
            else self.checked.train
        )
        units = _units(step, self.config, prompts, self.pairs_per_prompt)
        rate = _rate(record, self.store, max(units, 1.0), took, "calibration")
        self.rates[kind] = _whole_evaluation(rate, self.whole) if stage == "evaluate" else rate
        self.made[step.shown_as] = built
        if place.step == "iter_02" and step.shown_as == "weigh":
            raise _Enough  # with the passes of a policy that is not the start model, all kinds are known
        return built

    def built(self, place: Place, **stages: Built) -> None:
        pass

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        pass

    def selected(self, *what: Any) -> None:
        pass

    def compared(self, *what: Any) -> None:
        pass


def _whole_evaluation(rate: Rate, checked: Checked) -> Rate:
    """lm-eval's questions do not grow with the held-out answers: their whole number is a fixed cost. Models are loaded inside of both parts."""
    seconds = rate.record.seconds
    heldout, lm_eval, load = seconds.get("heldout", 0.0), seconds.get("lm_eval", 0.0), seconds.get("start_up", 0.0)
    loads = {"lm_eval": load / 2, "heldout": load / 2} if lm_eval else {"lm_eval": 0.0, "heldout": load}
    answering, asking = max(0.0, heldout - loads["heldout"]), max(0.0, lm_eval - loads["lm_eval"])
    asked = sum(min(_questions(task), CALIBRATION_QUESTIONS) for task in checked.evaluation.lm_eval)
    wall = rate.fixed + rate.units * rate.per_unit
    fixed = (
        wall
        - answering
        - asking
        + (asking * sum(map(_questions, checked.evaluation.lm_eval)) / asked if asked else 0.0)
    )
    return rate._replace(fixed=fixed, per_unit=answering / rate.units)


def _questions(task: Any) -> int:
    """Lines of the task's data files, or its limit."""
    lines = sum(path.read_bytes().count(b"\n") for path in Path(task.path).glob("*.jsonl"))
    return min(lines, task.limit or lines)


def _other(store: Store) -> float:
    """What earlier sessions in this store spent outside of stages: their median."""
    found = []
    for run in store.runs_with(ledger.FILE):
        with contextlib.suppress(ConfigError):  # killed before its first line was whole
            found += [one.other for one in ledger.read(store, run).sessions if one.is_finished]
    return statistics.median(found) if found else OTHER_SECONDS


def _keep(prediction: Prediction, store: Store) -> None:
    """`runs/<name>/estimate.json`, for `selfplay ledger` to set beside what was measured."""
    path = store.run_directory(prediction.run) / ledger.ESTIMATE
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": one.step.step, "shown_as": one.step.shown_as, "seconds": one.seconds, "source": one.source}
        for one in prediction.steps
    ]
    write_atomic(
        path,
        json.dumps(
            {"seconds": prediction.seconds, "half_width": prediction.spread, "other": prediction.other, "steps": steps},
            indent=1,
        )
        + "\n",
    )


def show(prediction: Prediction) -> str:
    """For people: a line per step, sums, money, warnings."""
    lines = [
        f"{'step':8} {'stage':22} {'seconds':>9} {'+- 95 %':>8} {'tokens in':>11} {'tokens out':>11} {'TFLOP':>9} {'GiB':>6} {'MB':>8}  from"
    ]
    for one in prediction.steps:
        cost = one.cost
        lines.append(
            f"{one.step.step:8} {one.step.shown_as:22} {one.seconds:9.1f} {1.96 * one.spread:8.1f} {cost.get('tokens_in', 0):11,.0f} "
            f"{cost.get('tokens_out', 0):11,.0f} {cost.get('flops', 0) / 1e12:9.2f} {cost.get('peak_rss_bytes', 0) / 2**30:6.2f} {cost.get('bytes', 0) / 1e6:8.1f}  {one.source}"
        )
    disk = sum(one.cost.get("bytes", 0.0) for one in prediction.steps)
    total = f"{prediction.seconds:.0f} s +- {prediction.spread:.0f} s ({prediction.seconds / 3600:.2f} h), of which {prediction.other:.0f} s outside the stages"
    lines += ["", f"total: {total}; {disk / 1e9:.2f} GB of disk"]
    if prediction.price_per_hour is not None:
        hours = prediction.seconds / 3600
        half = prediction.spread / 3600 * prediction.price_per_hour
        lines.append(
            f"money: {hours * prediction.price_per_hour:.2f} +- {half:.2f} at {prediction.price_per_hour:g} per hour"
        )
    if disk > prediction.disk_free:
        lines.append(
            f"DISK: {disk / 1e9:.1f} GB are needed, {prediction.disk_free / 1e9:.1f} GB are free: training.save_dtype: bfloat16 halves the checkpoints, --store names another disk"
        )
    if unknown := sorted({one.step.shown_as for one in prediction.steps if one.source == "unknown"}):
        lines.append(f"not known, and counted as 0: {', '.join(unknown)} (leave out --no-calibrate)")
    if prediction.left_out:
        lines.append(f"not included, because a calibration would pay a judge for it: {', '.join(prediction.left_out)}")
    return "\n".join(lines)
