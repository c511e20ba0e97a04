"""Flows - a comparison: variants of one run, what may differ between them, and what came out, from the records alone.

Prompts, generations, scores and log-probs that do not depend on a variant are built once: equal settings and inputs
have equal keys.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from data_contracts.config import Config, flatten, parse, read_yaml
from data_contracts.errors import ConfigError
from data_contracts.installation import provided, provided_beside
from data_contracts.rows import HeldoutRow
from data_contracts.store import Store
from flows.config import NAME, RunConfig, apply, merge, read_run
from flows.forecast.rehearsal import Step, rehearse
from flows.preflight import preflight
from flows.report.channels import Nowhere
from flows.report.history import History
from flows.report.page import markdown_table
from flows.report.story import Story
from stages.evaluation.heldout import per_prompt
from stages.evaluation.intervals import Interval, paired_bootstrap
from stages.stage import STAGES
from tasks.place import Purpose

PAPER_PHASES = ("generation", "weights", "training")
"""Columns of the paper's Table 3."""
PHASES = tuple(dict.fromkeys([*PAPER_PHASES, *(stage.phase for stage in STAGES.values())]))
MEASURING = (Purpose.HELDOUT, Purpose.CHECKPOINT, Purpose.BASELINE, Purpose.TOURNAMENT)


START = "start"
"""In a claim's order: the model that the runs began with."""


class Claim(Config):
    """A published claim that the comparison tries (flows/claims.py)."""

    source: str
    """Where it is made, e.g. `SWIFT, Table 3`."""
    statement: str
    measure: Literal["score", "fluency", "rouge_l", "truth_logp", "preference", "training_loss", "winner_logratio"]
    """More is better."""
    order: tuple[str, ...] = Field(min_length=2)
    """Variants, the best first; `start` is the model that the runs began with."""
    equal_within: float | None = Field(None, gt=0)
    """The others differ from the first by less than this. None: each is above the next."""
    reading: str = ""
    """What a reader must know to judge the result, if anything."""


class ComparisonConfig(Config):
    """Variants of one run config."""

    name: str = Field(pattern=NAME, max_length=40)
    base: str
    """Run config, relative to this file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Sections laid over `base`, for all variants."""
    vary: tuple[str, ...] = Field(min_length=1)
    """Fields (dotted; a section means all of it) in which variants may differ. A difference anywhere else is refused.
    """
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> sections laid over `base` and `set`; the first one is what the others are compared with."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    paper: dict[str, float] = Field(default_factory=dict)
    """Published figures to print beside the measured ones: weights_ratio (second variant / first), weights_share (of
    the first's training).
    """
    claims: tuple[Claim, ...] = ()
    """What it is to show; decided in its report."""
    sizes: dict[str, str] = Field(default_factory=dict)
    """Name -> a file of sections, relative to this one, that `--size NAME` lays over `base` and `set`, below the
    variants' own: larger models and more data, for a GPU."""

    @model_validator(mode="after")
    def _claims_name_variants(self) -> ComparisonConfig:
        for claim in self.claims:
            if strange := [name for name in claim.order if name not in (*self.variants, START)]:
                raise ValueError(
                    f"the claim {claim.statement!r} orders {', '.join(strange)}, and the variants are "
                    f"{', '.join(self.variants)}"
                )
        return self


class Variant(NamedTuple):
    name: str
    seed: int
    config: RunConfig


class Comparison(NamedTuple):
    config: ComparisonConfig
    variants: list[Variant]

    def check(self, store: Store) -> None:
        """Every variant's own checks, before the first is started. Raises: ConfigError."""
        for variant in self.variants:
            try:
                preflight(variant.config, store)
            except ConfigError as error:
                raise ConfigError(f"variant {variant.name}: {error}") from None


def load_comparison(path: Path | str, overrides: dict[str, Any] | None = None, size: str | None = None) -> Comparison:
    """`overrides` are settings of the runs, laid over all variants; `size` is a name of the comparison's `sizes`.

    Raises: ConfigError; for variants that differ in more than `vary`, with the fields.
    """
    path = Path(provided(os.fspath(path)))
    config = parse(ComparisonConfig, read_yaml(path), str(path))
    base = merge(read_run(provided_beside(path.parent, config.base)), config.set)
    if size is not None:
        if size not in config.sizes:
            raise ConfigError(f"{path}: no size is called {size!r}; there are {', '.join(config.sizes) or 'none'}")
        base = merge(base, read_run(provided_beside(path.parent, config.sizes[size])))
        config = config.model_copy(update={"name": f"{config.name}-{size}"})
    variants = []
    for name, settings in config.variants.items():
        for seed in config.seeds:
            data = apply(merge(base, settings), overrides or {}) | {
                "name": f"{config.name}-{name}-s{seed}".replace("_", "-"),
                "seed": seed,
            }
            variants.append(Variant(name, seed, parse(RunConfig, data, f"{path}, variant {name}")))
    first = flatten(variants[0].config.model_dump(mode="json"))
    for variant in variants[1:]:
        other = flatten(variant.config.model_dump(mode="json"))
        differing = [field for field in sorted(first.keys() | other.keys()) if first.get(field) != other.get(field)]
        if strange := [field for field in differing if not _may_differ(field, (*config.vary, "name", "seed"))]:
            raise ConfigError(
                f"{path}: variant {variant.name} differs from {variants[0].name} in {', '.join(strange)}, and `vary` "
                f"names only {', '.join(config.vary)}: the comparison would be of more than it says. "
                "Make them equal, or name them in `vary`"
            )
    return Comparison(config, variants)


def _may_differ(field: str, vary: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in vary)


class Outcome(NamedTuple):
    """One variant with one seed, as its records tell it."""

    variant: Variant
    steps: list[Step]
    heldout: list[list[HeldoutRow]]
    """Rows of the held-out answers, by iteration."""
    story: Story

    def seconds(self, iteration: int, what: str = "wall") -> dict[str, float]:
        """Seconds of each phase, whoever built its artifacts: what the variant would have cost on a store of its own.

        Log-probs that an earlier variant had stored cost nothing. what: wall, busy, or processor (all threads of all
        processes).
        """
        by_phase = dict.fromkeys(PHASES, 0.0)
        for step in self.steps:
            if step.iteration == iteration and step.record is not None:
                cost, seconds = step.record.cost, step.record.seconds
                by_phase[phase_of(step)] += (
                    cost.get("cpu_seconds", 0.0) if what == "processor" else seconds.get(what, 0.0)
                )
        return by_phase


def phase_of(step: Step) -> str:
    """Column of a step's seconds: auxiliary models are trained for the sake of the weights."""
    if step.place.purpose is Purpose.AUXILIARY:
        return "weights"
    if step.place.purpose in MEASURING:
        return "evaluation"
    return STAGES[step.stage].phase


def outcomes(comparison: Comparison, store: Store) -> list[Outcome]:
    """What every variant made, from the records. Raises: ConfigError for a comparison that is not complete."""

    results = []
    for variant in comparison.variants:
        history = History(variant.config, store, Nowhere(), Nowhere())
        steps = rehearse(variant.config, store, listener=history).steps
        if missing := [step.name for step in steps if step.record is None]:
            raise ConfigError(
                f"{variant.config.name} is not complete ({missing[0]} is not built): "
                "run the comparison again, it goes on"
            )
        results.append(Outcome(variant, steps, history.heldout, history.story()))
    return results


def sharing(results: list[Outcome]) -> dict[str, int]:
    """How many artifacts the variants asked for, how many exist, and how many serve more than one variant."""
    uses = Counter((step.stage, step.key) for outcome in results for step in outcome.steps)
    return {"asked for": sum(uses.values()), "built": len(uses), "shared": sum(count > 1 for count in uses.values())}


def _scores(outcome: Outcome, iteration: int) -> dict[str, float]:
    """Mean score of each prompt; the seed is part of a prompt's name, so that seeds are pooled prompt by prompt."""
    return {
        f"{outcome.variant.seed}/{name}": value
        for name, value in per_prompt(outcome.heldout[iteration], "score").items()
    }


def pooled_scores(results: list[Outcome], iteration: int) -> dict[str, float]:
    """The scores of all seeds at an iteration, by seed and prompt."""
    return {name: value for outcome in results for name, value in _scores(outcome, iteration).items()}


def table(comparison: Comparison, results: list[Outcome]) -> list[dict[str, Any]]:
    """Return one row per variant, seeds pooled: gain over its start, gain over the first variant, cost per seed."""
    rows = []
    names = list(comparison.config.variants)
    groups = {name: [outcome for outcome in results if outcome.variant.name == name] for name in names}
    last = comparison.variants[0].config.iterations
    for name in names:
        group = groups[name]
        # An ablation of iterations may stop early (the gate); every variant is measured at its own last one.
        before, after = pooled_scores(group, 0), pooled_scores(group, -1)
        row: dict[str, Any] = {"variant": name, "seeds": len(group), "start": _mean(before), "final": _mean(after)}
        row["gain"] = gain_between(before, after)
        row[f"against {names[0]}"] = (
            gain_between(pooled_scores(groups[names[0]], -1), after) if name != names[0] else None
        )
        fluency = [line["start_logp"] for outcome in group for line in outcome.heldout[-1]]
        row["start_logp"] = float(np.mean([value for value in fluency if value is not None]))
        for phase in PHASES:
            row[f"{phase} s"] = sum(outcome.seconds(i)[phase] for outcome in group for i in range(1, last + 1)) / len(
                group
            )
        rows.append(row)
    return rows


def _mean(values: dict[str, float]) -> float | None:
    if values:
        return float(np.mean(list(values.values())))
    return None


def gain_between(before: dict[str, float], after: dict[str, float]) -> Interval | None:
    """The gain over the prompts that both have (prompt -> score); None without any."""
    return paired_bootstrap(before, after) if before.keys() & after.keys() else None


def seconds_table(comparison: Comparison, results: list[Outcome]) -> list[dict[str, Any]]:
    """Return the paper's Table 3: seconds of generation, weights and training per iteration and variant, with sums.

    Seconds are means over the seeds.
    """
    rows = []
    for name in comparison.config.variants:
        group = [outcome for outcome in results if outcome.variant.name == name]
        for iteration in range(1, comparison.variants[0].config.iterations + 1):
            row: dict[str, Any] = {"variant": name, "iteration": iteration}
            for phase in PAPER_PHASES:
                row[phase] = float(np.mean([outcome.seconds(iteration)[phase] for outcome in group]))
                for what in ("busy", "processor"):
                    row[f"{phase} {what}"] = float(
                        np.mean([outcome.seconds(iteration, what)[phase] for outcome in group])
                    )
            rows.append(row)
    return rows


def ratios(comparison: Comparison, seconds: list[dict[str, Any]]) -> list[str]:
    """Return lines of two ratios of seconds: weights of a variant to the first's, weights to training by iteration."""
    names, paper, lines = list(comparison.config.variants), comparison.config.paper, []

    def beside(name: str) -> str:
        return f" (paper: {paper[name]:g})" if name in paper else ""

    for suffix, label in (
        ("", "wall"),
        (" busy", "wall without start-up"),
        (" processor", "processor time, whatever else the machine does"),
    ):
        total = {name: sum(row[f"weights{suffix}"] for row in seconds if row["variant"] == name) for name in names}
        for other in names[1:]:
            if total[names[0]] > 0:
                lines.append(
                    f"weights, {other} / {names[0]}: "
                    f"{total[other] / total[names[0]]:.2f}{beside('weights_ratio')} [{label}]"
                )
        first_rows = [row for row in seconds if row["variant"] == names[0]]
        shares = ", ".join(
            f"iteration {row['iteration']}: {row[f'weights{suffix}'] / row[f'training{suffix}']:.3f}"
            for row in first_rows
            if row[f"training{suffix}"] > 0
        )
        lines.append(f"weights / training of {names[0]}: {shares}{beside('weights_share')} [{label}]")
    return lines


def text(comparison: Comparison, results: list[Outcome]) -> str:
    """Everything as Markdown."""
    seconds = seconds_table(comparison, results)
    share = sharing(results)
    parts = [
        f"# Comparison {comparison.config.name}",
        "",
        markdown_table(cells_of(table(comparison, results))),
        "",
        f"Intervals: 95 %, paired bootstrap over prompts, seeds pooled ({len(comparison.config.seeds)}). "
        "Seconds per seed, without iteration 0.",
        f"{share['asked for']} artifacts asked for, {share['built']} built, {share['shared']} of them shared by "
        "several runs. Log-probs of one model and response are computed once: who comes first pays.",
        "",
        "## Seconds per iteration",
        "",
        markdown_table(cells_of(seconds)),
        "",
        *(f"- {line}" for line in ratios(comparison, seconds)),
        "",
    ]
    return "\n".join(parts)


def cells_of(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows with every value as a text."""
    return [{name: _cell(value) for name, value in row.items()} for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Interval):
        return value.text()
    if isinstance(value, float) and abs(value) < 10:
        return f"{value:.3f}"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)
