"""Flows - report.html and comparison.html: pages in one file that ask no network and run no script.

The HTML is in report.jinja and comparison.jinja, on the frame of document.jinja; what they show comes from sections.py.
Every text is escaped (autoescape), the drawings of figures.py escape theirs, and text.py shows hidden characters. A part without data is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from flows.report.figures import HALF, WIDE
from flows.report.overlay import LaidRun
from flows.report.sections import Section, headline_numbers, sections_of
from flows.report.story import Story
from flows.report.text import as_markdown, visible

if TYPE_CHECKING:
    from jinja2 import Environment

DIRECTORY = Path(__file__).parent


def render(story: Story) -> str:
    """The page of a run."""
    return _fill("report.jinja", story=story, tiles=headline_numbers(story), sections=sections_of(story))


def render_comparison(name: str, runs: Sequence[LaidRun], sections: Sequence[Section]) -> str:
    """The page of several runs laid over each other, with a link to the page of each."""
    return _fill("comparison.jinja", name=name, runs=runs, sections=sections)


def standalone_figures(story: Story) -> dict[str, str]:
    """Name -> SVG file of each figure of a run's page, with its caption as the title, the page's colours and what they mean."""
    figures = [figure for section in sections_of(story) for figure in section.figures]
    return {
        figure.name: _fill("standalone.jinja", caption=figure.caption, drawing=figure.draw(), labels=figure.labels)
        for figure in figures
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; None is "unscored", a missing column is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(map(_cell, names)) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append("| " + " | ".join("unscored" if cell is None else _cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """The text of a cell. A name keeps its underscores: inside a word they are no markup."""
    return as_markdown(" ".join(str(value).split())).replace("\\_", "_")


def _fill(template: str, **values: Any) -> str:
    return visible(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "style": Markup((DIRECTORY / "style.css").read_text(encoding="utf-8")),
        "widths": {1: WIDE, 2: HALF},
    }
    return environment
