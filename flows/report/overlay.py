"""Flows - several runs laid over each other: their curves, what separates them, their settings, their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from data_contracts.config import flatten
from flows.config import RunConfig
from flows.report import figures
from flows.report.answers import PromptAnswers, side_by_side
from flows.report.figures import Figure, Series
from flows.report.plots import MOST_STEPS, iterations_of, metric_curve, steps_of
from flows.report.sections import Section
from flows.report.story import Story
from flows.report.tables import Table, table_of
from flows.tournament import spread
from stages.evaluation.heldout import per_prompt
from stages.evaluation.intervals import Interval, paired_bootstrap

MOST_RUNS = figures.COLOURS
"""Runs that are drawn: each has a colour of its own."""
HELDOUT = (
    ("score", "Held-out score, 95 % interval over prompts", "score", "score"),
    ("tokens", "Tokens per held-out answer", "mean_tokens", "tokens"),
    ("fluency", "Mean log-prob per token under the start model", "start_logp", "nats"),
    ("accuracy", "Held-out pairs whose chosen text gained more", "preference_accuracy", "part"),
    ("margin", "Margin of the held-out pairs over the start model", "preference_margin", "nats"),
    ("response", "Log-prob per token of the true responses", "response_logp", "nats"),
)
"""Name of a figure, caption, held-out metric and axis."""
CURVES = {
    "loss": ("Loss (those of two methods have no common scale)", "loss"),
    "rewards/margins": ("Reward margin", "chosen minus rejected"),
    "rewards/accuracies": ("Pairs whose chosen response has the higher reward", "part"),
    "grad_norm": ("Norm of the gradient, before it is clipped", "norm"),
    "learning_rate": ("Learning rate", "rate"),
}
"""Metric of a step -> caption and axis."""


class LaidRun(NamedTuple):
    """One of the runs."""

    label: str
    story: Story
    config: RunConfig
    link: str
    """Its own page, relative to the one that is made."""


def overlay(runs: Sequence[LaidRun]) -> list[Section]:
    """The sections of a page about these runs; those without content are left out. The first run is the one that the
    others are compared with."""
    drawn = runs[:MOST_RUNS]
    notes = [not_comparable(runs)]
    if len(drawn) < len(runs):
        notes.append(f"The first {MOST_RUNS} of {len(runs)} runs are drawn.")
    note = " ".join(filter(None, notes))
    sections = [
        Section("progress", "Did they get better?", note=note, figures=_progress(drawn)),
        Section("runs", "In numbers", table=_numbers(runs)),
        Section("settings-that-differ", "What differs in the settings", table=differing_settings(runs)),
        Section("training", "Training", figures=_training(drawn)),
        Section("answers", "The same prompts, run by run", answers=_answers(drawn)),
    ]
    return [section for section in sections if section.has_content]


def not_comparable(runs: Sequence[LaidRun]) -> str:
    """Return why the held-out scores of these runs have no common scale; "" if they have one."""
    first = runs[0]
    differing = []
    if any(run.config.evaluation.scorer != first.config.evaluation.scorer for run in runs):
        differing.append("scorers (evaluation.scorer)")
    if any(_measured_on(run) != _measured_on(first) for run in runs):
        differing.append("held-out prompts (prompts.heldout)")
    if not differing:
        return ""
    return f"The held-out scores of these runs are not comparable: their {' and '.join(differing)} differ."


def _measured_on(run: LaidRun) -> set[str]:
    return {row["prompt_id"] for row in run.story.heldout[0]}


def differing_settings(runs: Sequence[LaidRun]) -> Table:
    """A row per setting that is not the same in all runs; their names, and where they run, are not compared."""
    settings = [flatten(run.config.model_dump(mode="json", exclude={"name", "execution"})) for run in runs]
    names = list(dict.fromkeys(name for values in settings for name in values))
    sections = list(dict.fromkeys(name.partition(".")[0] for name in names))
    rows = []
    for name in sorted(names, key=lambda name: sections.index(name.partition(".")[0])):
        texts = [_text(values[name]) if name in values else "" for values in settings]
        if len(set(texts)) > 1:
            rows.append({"setting": name, **{run.label: text for run, text in zip(runs, texts, strict=True)}})
    return table_of(rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _progress(runs: Sequence[LaidRun]) -> list[Figure]:
    """Held-out numbers of all runs over each other. A run has one colour in all figures, so none is left out of one."""
    labels = [run.label for run in runs]
    shown = []
    for name, caption, metric, axis in HELDOUT:
        curves = [metric_curve(run.story, metric, run.label) for run in runs]
        if any(value is not None for curve in curves for value in curve.y):
            shown.append(Figure(name, caption, partial(figures.lines, caption, curves, "iteration", axis), labels))
    differences = [_difference(runs[0], run) for run in runs]
    if any(len(curve.x) for curve in differences[1:]):
        caption = f"Held-out score minus that of {runs[0].label}, iteration by iteration, paired by prompt"
        draw = partial(figures.lines, caption, differences, "iteration", "score", zero=True)
        shown.insert(1, Figure("difference", caption, draw, labels))
    return shown


def _difference(first: LaidRun, other: LaidRun) -> Series:
    """The score of a run minus the first one's, at each iteration in which both have scored a common prompt."""
    both = zip(iterations_of(first.story), first.story.heldout, other.story.heldout, strict=False)
    gains = {iteration: _gain(before, after) for iteration, before, after in both}
    measured = {iteration: gain for iteration, gain in gains.items() if gain is not None}
    mean, low, high = ([getattr(gain, name) for gain in measured.values()] for name in ("mean", "low", "high"))
    return Series(other.label, list(measured), mean, low, high)


def _gain(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Interval | None:
    """The gain in score between two tables of held-out answers; None without a prompt that both could score."""
    scores = per_prompt(before, "score"), per_prompt(after, "score")
    return paired_bootstrap(*scores) if scores[0].keys() & scores[1].keys() else None


def _numbers(runs: Sequence[LaidRun]) -> Table:
    """A row per run: where it began and ended, its gain, and how far it is from the first one."""
    rows = []
    for run in runs:
        first, last = run.story.rows[0], run.story.rows[-1]
        row = {"run": run.label, "method": run.config.method.name, "iterations": last["iteration"]}
        row |= {"start": first["heldout_score"], "last": last["heldout_score"]}
        row["gain, 95 %"] = _interval(_gain(run.story.heldout[0], run.story.heldout[-1]))
        gap = None if run is runs[0] else _gain(runs[0].story.heldout[-1], run.story.heldout[-1])
        row[f"against {runs[0].label}, 95 %"] = _interval(gap)
        row |= {name: last[name] for name in ("mean_tokens", "start_logp")}
        row["seconds"] = round(sum(sum(seconds.values()) for seconds in run.story.seconds), 1)
        rows.append(row)
    return table_of(rows)


def _interval(gain: Interval | None) -> str:
    return gain.text() if gain else ""


def _training(runs: Sequence[LaidRun]) -> list[Figure]:
    """The metrics of the runs' optimizer steps over each other."""
    labels, steps_by_run = [run.label for run in runs], [steps_of(run.story)[0] for run in runs]
    shown = []
    for metric, (caption, axis) in CURVES.items():
        curves = []
        for label, lines in zip(labels, steps_by_run, strict=True):
            steps = spread(len(lines), MOST_STEPS)
            values = [lines[i].get(metric) for i in steps]
            curves.append(Series(label, [i + 1 for i in steps], values, dots=len(steps) < 60))
        if any(value is not None for curve in curves for value in curve.y):
            draw = partial(figures.lines, caption, curves, "optimizer step, all iterations", axis)
            shown.append(Figure(metric.replace("/", "-").replace("_", "-"), caption, draw, labels))
    return shown


def _answers(runs: Sequence[LaidRun]) -> list[PromptAnswers]:
    """The answers of the last policy of each run."""
    heldout = {f"{run.label}, iteration {iterations_of(run.story)[-1]}": run.story.heldout[-1] for run in runs}
    reasons = (f"{runs[-1].label} scores most above {runs[0].label}", f"{runs[-1].label} scores most below")
    prompts = {prompt_id: shown for run in runs for prompt_id, shown in run.story.prompts.items()}
    return side_by_side(heldout, prompts, reasons)
