"""Flows - responses token by token, with the weight of each as a colour behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from flows.report.story import SIDES, TokenPieces

SHADES = 5
"""Of a token's weight, above and below the middle one."""
LONGEST_PROMPT = 400
"""Characters of a prompt over its responses."""


class Token(NamedTuple):
    """A piece of a response and its weight."""

    text: str
    weight: float
    shade: str
    """Class of style.css: wp0 ... wp5 for more than the middle weight, wm1 ... wm5 for less."""


class TokenExample(NamedTuple):
    """A pair of responses, token by token."""

    name: str
    prompt: str
    sides: list[tuple[str, list[Token]]]


class TokenWeights(NamedTuple):
    """Examples of one iteration's weights."""

    iteration: int
    least: float
    middle: float
    """The weight without a colour."""
    most: float
    examples: list[TokenExample]


def token_weights(iteration: int, examples: Sequence[TokenPieces]) -> TokenWeights | None:
    """Examples with a shade per token, by the logarithm of its weight over the middle weight; None without any.

    Less and more have a scale of their own each, so that both show where one of them reaches further.
    """
    if not examples:
        return None
    weights = [weight for example in examples for pieces in example.sides.values() for _, weight in pieces]
    least, most, middle = min(weights), max(weights), middle_of(weights)
    below, above = (abs(_log_ratio(end, middle)) or 1.0 for end in (least, most))

    def token(text: str, weight: float) -> Token:
        height = _log_ratio(weight, middle)
        level = round(SHADES * height / (above if height >= 0 else below))
        return Token(text, weight, f"w{'p' if level >= 0 else 'm'}{abs(level)}")

    shaded = []
    for example in examples:
        sides = [(side, [token(*piece) for piece in example.sides[side]]) for side in SIDES if example.sides[side]]
        prompt = example.prompt
        if len(prompt) > LONGEST_PROMPT:
            prompt = prompt[:LONGEST_PROMPT] + " \N{HORIZONTAL ELLIPSIS}"
        shaded.append(TokenExample(example.name, prompt, sides))
    return TokenWeights(iteration, least, middle, most, shaded)


def middle_of(weights: Sequence[float]) -> float:
    """Return the weight that gets no colour: 1, which changes nothing, if there are weights on both sides of it.

    Else the median, and where that is an end (most weights are clamped there) the middle of the range.
    """
    least, most = min(weights), max(weights)
    if least < 1 < most:
        return 1.0
    median = sorted(weights)[len(weights) // 2]
    if least < median < most:
        return median
    return (least + most) / 2


def _log_ratio(weight: float, middle: float) -> float:
    return math.log(max(weight, 1e-6) / max(middle, 1e-6))
