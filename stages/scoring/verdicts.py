"""Stages - how the replies of judges are read: one rule for scorers and benchmarks.

A reply that says two things says nothing: `[[A]] and [[B]]` is no verdict, whoever asked for it. A number may be
written with a decimal comma; a number in brackets that no word calls a rating is a reference to something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

NUMBER = r"-?\d+(?:\.\d+|,\d{1,2})?(?![.,]?\d)"
"""A number with at most one decimal point, or a decimal comma; not `4,500` and not `4.5.2`."""
_SCORE = re.compile(rf"score[*_`\s]*:[*_`\s]*({NUMBER})", re.IGNORECASE)
_RATING = re.compile(rf"\[\[\s*({NUMBER})\s*\]\]")
_SINGLE_RATING = re.compile(rf"\b(?:rating|score)\b[^\d\[\]\n]{{0,20}}\[\s*({NUMBER})\s*\]", re.IGNORECASE)
_SPACE = " \t\r\n▁Ġ"  # the last two are how SentencePiece and byte-level vocabularies write a space


def only_verdict(text: str, verdicts: Sequence[str]) -> str | None:
    """Return the one of `verdicts` that the text has in double brackets; None without any, or with different ones.

    >>> only_verdict("[[A]] ... so: [[ A ]]", "ABC"), only_verdict("[[A]] and [[B]]", "ABC")
    ('A', None)
    """
    spelled = {match.strip() for match in re.findall(r"\[\[([^\[\]]*)\]\]", text)}
    given = [verdict for verdict in verdicts if verdict in spelled]
    if len(given) == 1:
        return given[0]
    return None


def is_contradiction(text: str, verdicts: Sequence[str]) -> bool:
    """Whether the text has several different ones of `verdicts` in double brackets."""
    return sum(only_verdict(text, [verdict]) is not None for verdict in verdicts) > 1


def last_score(text: str) -> float | None:
    """Return x of the last `Score: x` in the text.

    >>> last_score("Score: 1? No. **Score:** 4,5"), last_score("Score: 4,500")
    (4.5, None)
    """
    scores = _SCORE.findall(text)
    if not scores:
        return None
    return _value(scores[-1])


def bracketed_rating(text: str) -> float | None:
    """Return the first `[[x]]` of the text, or else the x of `rating: [x]`.

    >>> bracketed_rating("see [1] and [2]. Rating: [[9]]"), bracketed_rating("see [1] and [2]. Rating: 9")
    (9.0, None)
    """
    match = _RATING.search(text) or _SINGLE_RATING.search(text)
    if match is None:
        return None
    return _value(match[1])


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def bare_token(token: str) -> str:
    """Return a token without the spaces around it, however the vocabulary writes them.

    >>> bare_token(" M"), bare_token("▁M")
    ('M', 'M')
    """
    return token.strip(_SPACE)


def mass_by_token(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Return token -> probability, the spellings of one token (`M`, ` M`) added up."""
    masses: dict[str, float] = {}
    for token, logprob in logprobs.items():
        name = bare_token(token)
        masses[name] = masses.get(name, 0.0) + math.exp(logprob)
    return masses
