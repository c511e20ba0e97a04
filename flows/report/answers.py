"""Flows - the answers of several policies to the same held-out prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_contracts.rows import HeldoutRow
from flows.report.story import ShownPrompt, Story
from flows.tournament import spread

LONGEST_TEXT = 1500
"""Characters that are shown of a prompt or an answer."""
SHOWN_ITERATIONS = 6
"""Iterations of a run whose answers are shown."""
SPACED, EXTREME = 6, 2
"""Prompts that are shown: evenly spaced ones, and those whose score differs most, in each direction."""


class Answer(NamedTuple):
    """A policy's answer to a prompt."""

    policy: str
    score: str
    tokens: int
    text: str


class PromptAnswers(NamedTuple):
    """The answers of several policies to one prompt."""

    name: str
    reason: str
    """Why this prompt is shown; "" for one of the evenly spaced ones."""
    prompt: str
    """Its text; "" where the name says all of it."""
    answers: list[Answer]


def answers_of(story: Story) -> list[PromptAnswers]:
    """The answers of at most SHOWN_ITERATIONS iterations to a few prompts that all of them answered."""
    heldout = {f"iteration {row['iteration']}": rows for row, rows in zip(story.rows, story.heldout, strict=True)}
    names = list(heldout)
    shown = {names[i]: heldout[names[i]] for i in spread(len(names), SHOWN_ITERATIONS)}
    return side_by_side(shown, story.prompts, ("rose most", "fell most"))


def side_by_side(
    heldout: Mapping[str, Sequence[HeldoutRow]], prompts: Mapping[str, ShownPrompt], reasons: tuple[str, str]
) -> list[PromptAnswers]:
    """The answers of policies (name -> rows of `heldout`) to a few prompts that all of them answered.

    reasons: what is said of a prompt on which the last policy scores more, or less, than the first one.
    """
    by_prompt = {policy: _first_answers(rows) for policy, rows in heldout.items()}
    first, *others = by_prompt.values()
    ids = [prompt_id for prompt_id in first if all(prompt_id in answers for answers in others)]
    if not ids:
        return []
    examples = []
    for prompt_id, reason in _telling_prompts(ids, list(by_prompt.values()), reasons):
        answers = [_answer(policy, rows[prompt_id]) for policy, rows in by_prompt.items()]
        shown = prompts.get(prompt_id, ShownPrompt(prompt_id, ""))
        text = "" if shown.name == repr(shown.text) else shown.text[:LONGEST_TEXT]
        examples.append(PromptAnswers(shown.name, reason, text, answers))
    return examples


def _answer(policy: str, row: HeldoutRow) -> Answer:
    score = "unscored" if row["score"] is None else f"{row['score']:.2f}"
    text = row["completion"].strip()
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + " \N{HORIZONTAL ELLIPSIS}"
    return Answer(policy, score, row["num_tokens"], text)


def _first_answers(rows: Sequence[HeldoutRow]) -> dict[str, HeldoutRow]:
    """prompt_id -> row of the first answer to it."""
    answers: dict[str, HeldoutRow] = {}
    for row in rows:
        answers.setdefault(row["prompt_id"], row)
    return answers


def _telling_prompts(
    ids: Sequence[str], by_prompt: Sequence[Mapping[str, HeldoutRow]], reasons: tuple[str, str]
) -> list[tuple[str, str]]:
    """(prompt_id, reason) of evenly spaced prompts, then of those whose score rose and fell most."""
    picked = [(ids[i], "") for i in spread(len(ids), SPACED)]
    spaced = {name for name, _ in picked}
    change = {}
    for name in ids:
        first, last = by_prompt[0][name]["score"], by_prompt[-1][name]["score"]
        if first is not None and last is not None and name not in spaced:
            change[name] = last - first
    order = sorted(change, key=lambda name: (change[name], name))
    rose, fell = reasons
    picked += [(name, rose) for name in reversed(order[-EXTREME:]) if change[name] > 0]
    picked += [(name, fell) for name in order[:EXTREME] if change[name] < 0]
    return picked
