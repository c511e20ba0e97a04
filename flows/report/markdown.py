"""Flows - report.md: the run's table, verdicts, tournament, data, answers and settings as Markdown."""

from __future__ import annotations

import re

from flows.report.page import markdown_table
from flows.report.sections import trained_rows
from flows.report.story import Story
from flows.report.text import as_markdown
from flows.tournament import Standing

SHOWN_PROMPTS = 8
"""Held-out prompts whose answers are shown."""


def markdown_report(story: Story) -> str:
    """The whole of report.md."""
    lines = [f"# Self-play run {story.name}", "", story.headline, ""]
    lines += [f"- {fact.label}: {as_markdown(fact.value)}" for fact in story.about.facts]
    if story.about.load:
        lines += ["", "```python", story.about.load, "```"]
    lines += ["", markdown_table(story.rows), ""]
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
        for iteration, rows in enumerate(story.heldout):
            match = next(r for r in rows if (r["prompt_id"], r["candidate"]) == (row["prompt_id"], row["candidate"]))
            text = re.sub(r"\s+", " ", match["completion"]).strip()
            score = "unscored" if match["score"] is None else f"{match['score']:.2f}"
            lines.append(f"- iteration {iteration} ({score}): {as_markdown(text)}")
        lines.append("")
    return lines
