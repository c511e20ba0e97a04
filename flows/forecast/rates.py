"""Flows - what one kind of step takes on this machine: from the store's records, else from a calibration.

    seconds(step) = fixed + units x seconds per unit

The calibration plays the run's own stages on CALIBRATION_PROMPTS prompts, in a store of its own
(`<store>/calibration`), once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import digests_kept_in
from data_contracts.config import Config
from data_contracts.installation import provided
from data_contracts.store import Store
from flows import hands
from flows.config import RunConfig
from flows.forecast.rehearsal import Step
from flows.gate import Verdict
from flows.preflight import Checked, models_of
from flows.self_play import SelfPlay
from flows.tournament import merged
from stages.evaluation.promotion import GateConfig, Measurement
from stages.running.cost import parameters
from stages.running.history import events
from stages.stage import STAGES
from tasks.build import Built, build
from tasks.data.prompt_set import PromptSet
from tasks.place import Place, Purpose
from tasks.prompts import publish

CALIBRATION_PROMPTS = 32
CALIBRATION_QUESTIONS = 10
"""Of each lm-eval task."""
NOISE = 0.10
"""Relative spread of one stage's seconds between equal runs, at least: a machine is never quite the same
(docs/costs.md).
"""
JUDGED_BENCHMARKS = ("mt_bench", "alpaca_eval", "arena_hard")
"""Parts of `evaluation` that ask judges: left out of a calibration, because judges cost money."""
LOOKING_SECONDS = 0.5
"""What finding a built artifact and launching a process take beside the stage's own seconds."""


class Rate(NamedTuple):
    """What one kind of step takes on this machine."""

    fixed: float
    per_unit: float
    spread: float
    """Relative standard deviation of the seconds."""
    units: float
    """Units of the step that was measured."""
    record: ArtifactRecord
    source: str
    """records or calibration."""


def kind_of(step: Step, start: ArtifactRef) -> str:
    """Steps of one kind cost alike.

    A weigh stage whose policy is the start model, a warm start's included, finds its pass among the scores' fluency
    floors. Checkpoints from the middle of a training are measured as the last one is.
    """
    if step.place.purpose is Purpose.CHECKPOINT:
        return step.place.serving(Purpose.HELDOUT).name_of(step.stage)
    if step.stage == "weigh" and "policy" in step.inputs:
        is_first = step.iteration == 1 or step.inputs["policy"].content == start.content
        return f"{step.name} (first)" if is_first else step.name
    return step.name


def units_of(step: Step, config: RunConfig, num_prompts: int, pairs_per_prompt: float) -> float:
    """What the step's seconds grow with: candidates, pairs (times epochs) or held-out answers."""
    unit = STAGES[step.stage].unit
    if unit == "answers":
        return num_prompts * config.sampling_for_heldout().num_candidates
    if unit == "candidates":
        return num_prompts * getattr(step.config, "num_candidates", config.sampling.num_candidates)
    files = 2 if "more_pairs" in step.inputs else 1
    return num_prompts * pairs_per_prompt * files * getattr(step.config, "epochs", 1)


def measured_units(record: ArtifactRecord, config: Config, num_candidates: int) -> float:
    """The same of a finished artifact, where a prompt gave one pair; `num_candidates`: of each prompt."""
    metrics, unit = record.metrics, STAGES[record.stage].unit
    if unit == "candidates":
        pairs = metrics.get("pairs", record.rows)
        return max(1.0, metrics.get("candidates", pairs * num_candidates))
    if unit == "answers":
        return max(1.0, record.rows)
    if record.stage == "train":
        return max(1.0, metrics.get("steps", 1) * getattr(config, "batch_size", 1))
    return max(1.0, metrics.get("pairs", record.rows))


def rate_from_records(
    step: Step, records: Sequence[ArtifactRecord], store: Store, start: ArtifactRef, num_candidates: int
) -> Rate | None:
    """Return the rate of the newest record with the same host, stage, settings (but seeds) and model sizes, or None."""
    # A checkpoint that is to be trained will have as many parameters as the one it starts from.
    inputs = {name: start if ref.kind == "checkpoint" and not ref.path else ref for name, ref in step.inputs.items()}
    with digests_kept_in(store):
        settings, size = _unseeded(STAGES[step.stage].settings(step.config, inputs)), _size(inputs.values())
    for record in records:
        is_like = (
            record.stage == step.stage
            and record.version == STAGES[step.stage].version
            and record.provenance.get("host") == platform.node()
            and record.provenance.get("starts", 1) == 1
            and record.inputs.keys() == step.inputs.keys()
            and _unseeded(record.config) == settings
            and _size(record.inputs.values()) == size
        )
        if not is_like or (step.stage == "weigh" and record.cost.get("tokens_in", 0) <= 0):
            continue
        record = record.model_copy(update={"cost": record.cost | {"pairs_per_prompt": 1.0}})
        units = measured_units(record, step.config, num_candidates)
        return _rate(record, store, units, record.seconds["wall"] + LOOKING_SECONDS, "records")
    return None


def _unseeded(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in identity.items() if name not in ("seed", "learning_rate")}


def _size(inputs: Iterable[ArtifactRef]) -> tuple[int, ...]:
    """Parameters of the models a step reads."""
    return tuple(sorted({parameters(ref.path) for ref in inputs if ref.kind == "checkpoint"}))


def _rate(record: ArtifactRecord, store: Store, units: float, wall: float, source: str) -> Rate:
    """Split a measured step into what it takes once (importing, loading, exporting) and what each unit takes.

    A training's first step is a warm-up, so its rate is the median of the others; sampling counts the seconds of
    generating.
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
    total_spread = math.sqrt(NOISE**2 + spread**2 + lengths**2)
    return Rate(wall - per_unit * units, per_unit, total_spread, units, record, source)


def calibrate(config: RunConfig, checked: Checked, store: Store) -> dict[str, Rate]:
    """Rate of each kind of step, from the first iterations played on a few prompts with the real stages."""
    small = _small(config)
    calibration_store = Store(store.root / "calibration")
    tasks = tuple(
        task.model_copy(update={"limit": min(task.limit or CALIBRATION_QUESTIONS, CALIBRATION_QUESTIONS)})
        for task in checked.evaluation.lm_eval
    )
    few = Checked(
        checked.train[:CALIBRATION_PROMPTS],
        checked.heldout[:CALIBRATION_PROMPTS],
        small.evaluation.model_copy(update={"lm_eval": tasks}),
    )
    start, models = models_of(small, calibration_store)
    measuring = MeasuringHands(small, calibration_store, start, few, checked)
    place = Place(str(calibration_store.root), small.name)
    with contextlib.suppress(EverythingMeasured):
        SelfPlay(small, few, start, models, measuring, measuring).play(place)
    return measuring.rates


def _small(config: RunConfig) -> RunConfig:
    """The run, with few prompts, and enough steps to tell the steady speed from the first one's."""
    training = {
        "epochs": max(config.training.epochs, 3),
        "batch_size": min(config.training.batch_size, CALIBRATION_PROMPTS),
        "checkpoints": (),
    }
    warm_start = config.warm_start
    if warm_start is not None:
        sizes = {name: value for name, value in training.items() if name != "checkpoints"}
        sizes["epochs"] = max(warm_start.epochs, 3)
        warm_start = warm_start.model_copy(update=sizes)
    prompts = {"per_iteration": CALIBRATION_PROMPTS, "reuse": True}
    changes = {
        "iterations": 2,
        "prompts": config.prompts.model_copy(update=prompts),
        "training": config.training.model_copy(update=training),
        "warm_start": warm_start,
        "evaluation": config.evaluation.model_copy(update=dict.fromkeys(JUDGED_BENCHMARKS) | {"suites": ()}),
        "scoring": config.scoring.model_copy(update={"max_drop_rate": 1.0}),
        "mix_previous": False,
        "gate": GateConfig(),
        "tournament": None,
    }
    return config.model_copy(update=changes)


class EverythingMeasured(Exception):
    """Every kind of step that will be asked for has a rate."""


class MeasuringHands:
    """Hands that build each kind of step once and time it; as a listener they hear nothing."""

    def __init__(self, config: RunConfig, store: Store, start: ArtifactRef, checked: Checked, whole: Checked):
        self.config, self.store, self.start, self.checked, self.whole = config, store, start, checked, whole
        self.rates: dict[str, Rate] = {}
        self.made: dict[str, Built] = {}
        self.pairs_per_prompt = 1.0

    def run(self, stage: str, config: Config, place: Place, **inputs: ArtifactRef) -> Built:
        step = Step(stage, config, place, inputs, None, None)
        kind = kind_of(step, self.start)
        if step.name in self.made and kind in self.rates:
            return self.made[step.name]  # measured: stands for the next one of its kind
        began = time.monotonic()
        built = build(stage, config, inputs, self.store, log=lambda text: None)
        wall = time.monotonic() - began
        if built.cached:
            wall = built.record.seconds["wall"] + LOOKING_SECONDS
        if stage == "score":
            self.pairs_per_prompt = built.record.metrics["pairs"] / max(1, len(self.checked.train))
        cost = built.record.cost | {"pairs_per_prompt": self.pairs_per_prompt}
        record = built.record.model_copy(update={"cost": cost})
        prompts = self.checked.heldout if place.purpose is Purpose.HELDOUT else self.checked.train
        units = units_of(step, self.config, len(prompts), self.pairs_per_prompt)
        rate = _rate(record, self.store, max(units, 1.0), wall, "calibration")
        self.rates[kind] = _with_all_questions(rate, self.whole) if stage == "evaluate" else rate
        self.made[step.name] = built
        if place.iteration == 2 and step.name == "weigh":
            raise EverythingMeasured  # with the passes of a policy that is not the start model, all kinds are known
        return built

    def publish(self, prompts: PromptSet, place: Place) -> ArtifactRef:
        return publish(prompts, self.store)

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        return merged(players, self.store)

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        return hands.read_answers(answers)

    def read_report(self, report: ArtifactRef) -> Measurement | None:
        return hands.read_report(report)

    def built(self, place: Place, **stages: Built) -> None:
        pass

    def measured(self, place: Place, answers: Built, report: Built) -> None:
        pass

    def selected(self, place: Place, checkpoints: Any, measurements: Any, gains: Any, chosen: int) -> None:
        pass

    def decided(self, place: Place, verdict: Verdict) -> None:
        pass

    def compared(self, scorer: str, names: Sequence[str], scored: Built | None, prompts: int) -> None:
        pass


def _with_all_questions(rate: Rate, checked: Checked) -> Rate:
    """Return the rate of an evaluation with all of lm-eval's questions.

    They are a fixed cost: their number does not grow with the held-out answers.
    """
    seconds = rate.record.seconds
    heldout, lm_eval, load = seconds.get("heldout", 0.0), seconds.get("lm_eval", 0.0), seconds.get("start_up", 0.0)
    # Models are loaded inside of both parts.
    heldout_load, lm_eval_load = (load / 2, load / 2) if lm_eval else (load, 0.0)
    answering, asking = max(0.0, heldout - heldout_load), max(0.0, lm_eval - lm_eval_load)
    tasks = checked.evaluation.lm_eval
    num_measured = sum(min(_questions(task), CALIBRATION_QUESTIONS) for task in tasks)
    fixed = rate.fixed + rate.units * rate.per_unit - answering - asking
    if num_measured:
        fixed += asking * sum(map(_questions, tasks)) / num_measured
    return rate._replace(fixed=fixed, per_unit=answering / rate.units)


def _questions(task: Any) -> int:
    """Lines of the task's data files, or its limit."""
    lines = sum(path.read_bytes().count(b"\n") for path in Path(provided(task.path)).glob("*.jsonl"))
    return min(lines, task.limit or lines)
