"""Flows - the report of a comparison: comparison.md, comparison.json and comparison.html."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from data_contracts.files import write_atomic
from data_contracts.redaction import redact
from data_contracts.store import Store
from flows.claims import claims_table, results_of
from flows.comparison import (
    PAPER_PHASES,
    Comparison,
    Outcome,
    cells_of,
    gain_between,
    pooled_scores,
    ratios,
    seconds_table,
    sharing,
    table,
    text,
)
from flows.report import figures
from flows.report.figures import Figure
from flows.report.overlay import LaidRun, overlay
from flows.report.page import render_comparison
from flows.report.sections import Section
from flows.report.tables import table_of
from stages.evaluation.intervals import Interval


def write_report(comparison: Comparison, results: list[Outcome], store: Store) -> Path:
    """`runs/<name>/comparison.md`, `.json` and `.html`; returns the page."""
    directory = store.run_directory(comparison.config.name)
    directory.mkdir(parents=True, exist_ok=True)
    rows, seconds = table(comparison, results), seconds_table(comparison, results)
    claims = claims_table(results_of(comparison, results, store))
    write_atomic(directory / "comparison.md", text(comparison, results))
    plain = [
        {name: value.as_json() if isinstance(value, Interval) else value for name, value in row.items()} for row in rows
    ]
    write_atomic(
        directory / "comparison.json",
        json.dumps({"variants": plain, "seconds": seconds, "sharing": sharing(results), "claims": claims}, indent=1)
        + "\n",
    )
    page = directory / "comparison.html"
    write_atomic(page, redact(_page(comparison, results, rows, seconds, claims)))
    return page


def _page(
    comparison: Comparison,
    results: list[Outcome],
    rows: list[dict[str, Any]],
    seconds: list[dict[str, Any]],
    claims: list[dict[str, str]],
) -> str:
    names = list(comparison.config.variants)
    curves = []
    for name in names:
        group = [outcome for outcome in results if outcome.variant.name == name]
        count = min(len(outcome.heldout) for outcome in group)
        gains = {
            i: gain
            for i in range(count)
            if (gain := gain_between(pooled_scores(group, 0), pooled_scores(group, i))) is not None
        }
        mean, low, high = ([getattr(gain, part) for gain in gains.values()] for part in ("mean", "low", "high"))
        curves.append(figures.Series(name, list(gains), mean, low, high))
    bars = [f"{row['variant']} {row['iteration']}" for row in seconds]
    stacked = [(phase, [row[phase] for row in seconds]) for phase in PAPER_PHASES]
    gain = partial(figures.lines, "gain", curves, "iteration", "gain", zero=True)
    duration = partial(figures.stacks, "seconds", bars, stacked, "variant, iteration", "seconds")
    lines = "\n".join(ratios(comparison, seconds))
    pooled = [
        Section("claims", "What it was to show", table=table_of(claims)),
        Section(
            "variants",
            "The variants, their seeds pooled",
            figures=[Figure("gain", "Held-out gain over the start, 95 %", gain, names)],
            table=table_of(cells_of(rows)),
        ),
        Section(
            "seconds",
            "What they cost",
            text=lines,
            figures=[Figure("duration", "Seconds per iteration", duration, PAPER_PHASES)],
            table=table_of(cells_of(seconds)),
        ),
    ]
    runs = [_laid(outcome, len(comparison.config.seeds) > 1) for outcome in results]
    return render_comparison(
        comparison.config.name, runs, [*(section for section in pooled if section.has_content), *overlay(runs)]
    )


def _laid(outcome: Outcome, with_seed: bool) -> LaidRun:
    """A variant with one seed, as a run of the page."""
    name, seed, config = outcome.variant
    label = f"{name}, seed {seed}" if with_seed else name
    return LaidRun(label, outcome.story, config, f"../{config.name}/report.html")
