"""Flows - the sections of report.html as data: which figures, tables and texts each of them shows, from a `Story`.

A section without data is left out, not shown empty. The HTML is in report.jinja.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_contracts.rows import ReportRow
from flows.report import plots
from flows.report.answers import PromptAnswers, answers_of
from flows.report.figures import Figure
from flows.report.story import Story
from flows.report.tables import Table, table_of
from flows.report.token_cards import TokenWeights, token_weights
from stages.evaluation.heldout import per_prompt
from stages.evaluation.intervals import paired_bootstrap

GIVEN = (
    "How likely the policy makes the texts that the held-out prompts bring, against the start model: what a method on "
    "given texts has learnt, whatever the scores of sampled answers say."
)
MOST_SOURCES = 30
"""Sources that have a row."""


class Tile(NamedTuple):
    """A number at the head of the page."""

    label: str
    value: str
    note: str = ""


class Section(NamedTuple):
    """A part of the page under its own heading. What it has is shown in the order of these fields."""

    name: str
    title: str
    gate_is_on: bool | None = None
    note: str = ""
    text: str = ""
    """Lines as they are."""
    figures: Sequence[Figure] = ()
    table: Table = Table([], [])
    hidden_benchmarks: int = 0
    """Benchmarks without a figure, because there are too many."""
    failures: Table = Table([], [])
    """Judgments that failed."""
    token_weights: TokenWeights | None = None
    answers: Sequence[PromptAnswers] = ()
    settings: str = ""

    @property
    def has_content(self) -> bool:
        """Whether there is anything under the heading."""
        tables = self.table.rows or self.failures.rows
        parts = (self.text, self.figures, tables, self.token_weights, self.answers, self.settings)
        return any(parts)


def headline_numbers(story: Story) -> list[Tile]:
    """The numbers at the head of the page."""
    last, first = story.rows[-1], story.rows[0]
    tiles = [Tile("iterations", str(last["iteration"]))]
    if first["heldout_score"] is not None and last["heldout_score"] is not None:
        tiles.append(Tile("held-out score", f"{last['heldout_score']:.3f}", f"from {first['heldout_score']:.3f}"))
    if gain := story.gains[-1]:
        tiles.append(_gain_tile("gain", gain))
        if controlled := gain.get("controlled"):
            tiles.append(_gain_tile("at equal length", controlled))
    tiles.append(Tile("tokens per answer", f"{last['mean_tokens']:g}", f"from {first['mean_tokens']:g}"))
    tiles.append(Tile("time", _duration(sum(sum(seconds.values()) for seconds in story.seconds)), "all stages"))
    if unscored := sum(row["score"] is None for rows in story.heldout for row in rows):
        tiles.append(Tile("unscored answers", str(unscored), "in no mean"))
    return tiles


def _gain_tile(label: str, gain: Mapping[str, float]) -> Tile:
    return Tile(label, f"{gain['mean']:+.3f}", f"95 % [{gain['low']:+.3f}, {gain['high']:+.3f}]")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def sections_of(story: Story) -> list[Section]:
    """The sections that have something to show, in the order of the page."""
    sections = [
        Section("score", "Did it get better?", figures=plots.progress(story)),
        Section("distributions", "Before and after", figures=plots.distributions(story)),
        Section("given", "Held-out pairs and responses", note=GIVEN, figures=plots.given_texts(story)),
        _gate(story),
        _checkpoints(story),
        _benchmarks(story),
        Section("training", "Training", figures=plots.training(story)),
        _weights(story),
        Section("lengths", "Lengths and fluency", figures=plots.lengths(story)),
        Section("prompts", "The data", text="\n".join(story.data)),
        Section(
            "data",
            "What trained, and what was dropped",
            table=table_of(trained_rows(story)),
            figures=plots.dropped(story),
        ),
        _sources(story),
        Section("responses", "The same prompts, iteration by iteration", answers=answers_of(story)),
        Section("times", "Where the time went", figures=plots.times(story)),
        Section("table", "All numbers", table=table_of(story.rows)),
        Section("settings", "Settings", settings=story.settings),
    ]
    return [section for section in sections if section.has_content]


def trained_rows(story: Story) -> list[dict[str, Any]]:
    """How much of each iteration's data trained, and why the rest did not."""
    rows = []
    for iteration, part in sorted(story.trained.items()):
        reasons = sorted(part.dropped.items(), key=lambda item: -item[1])
        why = "; ".join(f"{count:g} {reason}" for reason, count in reasons)
        rows.append({"iteration": iteration, **part.counts, "not trained, and why": why})
    return rows


def _sources(story: Story) -> Section:
    """What each source of the prompts gave to the training, and what the run gained on its held-out prompts."""
    used: dict[str, dict[str, int]] = {}
    for part in story.trained.values():
        for source, counts in part.sources.items():
            row = used.setdefault(source, {"training prompts": 0, "pairs to train on": 0})
            row["training prompts"] += counts.prompts
            row["pairs to train on"] += counts.pairs
    measured: dict[str, list[str]] = {}
    for prompt_id, prompt in story.prompts.items():
        measured.setdefault(prompt.source, []).append(prompt_id)
    sources = list(dict.fromkeys([*used, *(measured if len(measured) > 1 else ())]))
    # Those that trained most are shown, by name: what belongs together stands together.
    largest = sorted(sources, key=lambda source: -used.get(source, {}).get("training prompts", 0))[:MOST_SOURCES]
    before, after = (per_prompt(rows, "score") for rows in (story.heldout[0], story.heldout[-1]))
    rows = []
    for source in sorted(largest):
        ids = [name for name in measured.get(source, ()) if name in before and name in after]
        row: dict[str, Any] = {"source": source or "(none named)", **used.get(source, {})}
        row["held-out prompts"] = len(measured.get(source, ()))
        if ids:
            start, end = ({name: scores[name] for name in ids} for scores in (before, after))
            gain = paired_bootstrap(start, end)
            row["start"], row["last"] = (f"{sum(scores.values()) / len(ids):.3f}" for scores in (start, end))
            row["gain, 95 %"] = gain.text()
        rows.append(row)
    note = "By what the data says of each prompt's source; a source with few prompts has a wide interval."
    return Section("sources", "By source", note=note, table=table_of(rows))


def _gate(story: Story) -> Section:
    rows = []
    for decision in story.decisions:
        gain, detectable = decision["gain"], decision["detectable"]
        rows.append(
            {
                "iteration": decision["iteration"],
                "against": decision["against"],
                "outcome": decision["outcome"],
                "gain": f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else "",
                "detectable": "" if detectable is None else f"{detectable:.3f}",
                "prompts": decision["prompts"],
                "unscored": decision["unscored"],
                "why": decision["reason"],
            }
        )
    is_on = story.decisions[-1]["enabled"] if story.decisions else None
    return Section("gate", "Promotion gate", gate_is_on=is_on, table=table_of(rows))


def _checkpoints(story: Story) -> Section:
    note = "Of the checkpoints of one training, the one that measures best on the held-out prompts goes on."
    return Section("checkpoints", "Checkpoints of each training", note=note, table=table_of(story.selections))


def _benchmarks(story: Story) -> Section:
    shown, hidden = plots.benchmarks(story)
    failures = []
    for iteration, report in zip(plots.iterations_of(story), story.reports, strict=True):
        failures += [_failure(iteration, row) for row in report if row["metric"] == "failed_judgments" and row["value"]]
    failed = table_of(failures)
    return Section("benchmarks", "Benchmarks", figures=shown, hidden_benchmarks=hidden, failures=failed)


def _failure(iteration: int, row: ReportRow) -> dict[str, Any]:
    """A row of the table of failed judgments."""
    return {
        "iteration": iteration,
        "benchmark": row["task"],
        "failed": int(row["value"]),
        "of": row["n"],
        "judge": row["task_version"],
        "result": "unscored" if row["value"] == row["n"] else "of the others",
    }


def _weights(story: Story) -> Section:
    tokens = None
    if story.weights:
        last = max(story.weights)
        tokens = token_weights(last, story.weights[last].examples)
    return Section("weights", "Token weights", figures=plots.weights(story), token_weights=tokens)
