"""Flows - report.md: the run's table, verdicts, tournament, data, answers and settings as Markdown."""

from __future__ import annotations

import re
from typing import Any

from flows.report.about import Fact
from flows.report.page import markdown_table
from flows.report.sections import trained_rows
from flows.report.story import Story
from flows.report.text import as_markdown
from flows.tournament import Standing
from stages.evaluation.intervals import Interval

SHOWN_PROMPTS = 8
"""Held-out prompts whose answers are shown."""


def markdown_report(story: Story) -> str:
    """The whole of report.md."""
    lines = [f"# Self-play run {story.name}", "", story.headline, ""]
    lines += [f"- {fact.label}: {_value(fact)}" for fact in story.about.facts]
    if story.about.load:
        lines += ["", "```python", story.about.load, "```"]
    lines += ["", markdown_table(_rows(story)), ""]
    if story.decisions:
        lines += ["## Promotion gate", ""]
        if not story.decisions[-1]["enabled"]:
            lines += ["It only watches here: gate.enabled is false.", ""]
        lines += [
            f"- iteration {decision['iteration']} against {decision['against']}: {decision['outcome']} "
            f"({decision['reason']})"
            for decision in story.decisions
        ]
        lines += [""]
    if story.selections:
        lines += ["## Checkpoints of each training", "", markdown_table(story.selections), ""]
    if story.tournament:
        lines += ["## Tournament", "", *_tournament_lines(story.tournament), ""]
    if story.trained:
        lines += ["## What trained, and what was dropped", "", markdown_table(trained_rows(story)), ""]
    if story.data:
        lines += ["## The data", "", "```", *(line.replace("```", "'''") for line in story.data), "```", ""]
    lines += ["## The same prompts, iteration by iteration", "", *_examples(story)]
    return "\n".join([*lines, "", "## Settings", "", "```json", story.settings, "```", ""])


def _value(fact: Fact) -> str:
    """What a line of the head says; a path can be copied from the file as it stands."""
    if fact.label == "checkpoint" and "`" not in fact.value:
        return f"`{fact.value}`"
    return as_markdown(fact.value)


def _rows(story: Story) -> list[dict[str, Any]]:
    """The table's rows, with the gain over the start model at equal length where it is known."""
    if not any("controlled" in gain for gain in story.gains):
        return story.rows
    rows = []
    for row, gain in zip(story.rows, story.gains, strict=True):
        is_known = "controlled" in gain and row["iteration"]
        text = Interval(**gain["controlled"]).text() if is_known else ""
        rows.append({"iteration": row["iteration"], "gain at equal length [95 %]": text} | row)
    return rows


def _tournament_lines(standing: Standing) -> list[str]:
    rows = [
        {"": name}
        | {
            f"against {other}": "" if rate is None else f"{100 * rate:.1f} %"
            for other, rate in zip(standing.names, line, strict=True)
        }
        for name, line in zip(standing.names, standing.rates, strict=True)
    ]
    caption = (
        f"By {standing.scorer}, over {standing.prompts} prompts; {standing.failed} comparisons failed: in no mean."
    )
    return [caption, "", markdown_table(rows)]


def _examples(story: Story) -> list[str]:
    """The answers of every iteration to a few prompts."""
    first = story.heldout[0]
    step = max(1, len(first) // SHOWN_PROMPTS)
    lines = []
    for row in first[::step][:SHOWN_PROMPTS]:
        shown = story.prompts.get(row["prompt_id"])
        lines += [f"**{as_markdown(shown.name if shown else row['prompt_id'])}**", ""]
        if shown and shown.text != shown.name:
            lines += [f"> {as_markdown(' '.join(shown.text.split()))}", ""]
        for iteration, rows in enumerate(story.heldout):
            match = next(r for r in rows if (r["prompt_id"], r["candidate"]) == (row["prompt_id"], row["candidate"]))
            text = re.sub(r"\s+", " ", match["completion"]).strip()
            score = "unscored" if match["score"] is None else f"{match['score']:.2f}"
            lines.append(f"- iteration {iteration} ({score}): {as_markdown(text)}")
        lines.append("")
    return lines
