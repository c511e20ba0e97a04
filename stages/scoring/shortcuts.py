"""Stages - what a policy could learn instead of a preference: chosen and rejected told apart by one token or by length.

A loss takes whatever tells the two sides apart. Where given texts end with another token than generations, or begin
with a blank, or are always longer, it learns that and nothing else. So every shard of pairs is asked: how many of its
pairs would a reader order rightly who sees only the last token, only the first, or only the length?

Axes: N pairs of two responses, neither of them empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LIMIT = 0.9
"""Share of pairs ordered rightly by one feature from which it is reported."""
FEWEST = 10
"""Pairs from which a share says something: of ten pairs, all are longer on one side by chance once in 512 times."""
PREFIX = "told_apart/"
"""Of the metrics' names: told_apart/last_token, told_apart/first_token, told_apart/length; 0.5 is chance."""


class Ends(NamedTuple):
    """First and last ids and lengths of both sides; int64, column 0 chosen, column 1 rejected."""

    first: np.ndarray  # [N, 2]
    last: np.ndarray  # [N, 2]
    length: np.ndarray  # [N, 2]

    @classmethod
    def of(cls, chosen: Iterable[Sequence[int]], rejected: Iterable[Sequence[int]]) -> Ends:
        """The ends of pairs of responses; a pair with an empty side is left out."""
        pairs = [pair for pair in zip(chosen, rejected, strict=True) if len(pair[0]) and len(pair[1])]
        columns = [[[side[0], side[-1], len(side)] for side in pair] for pair in pairs]
        table = np.array(columns, dtype=np.int64).reshape(-1, 2, 3)
        return cls(table[..., 0], table[..., 1], table[..., 2])

    @classmethod
    def of_table(cls, pairs: pa.Table) -> Ends:
        """The same from a table of `scored_pairs`, without a Python object per token."""
        columns = []
        for side in ("chosen", "rejected"):
            ids = pairs[f"{side}_ids"]
            lengths = pc.list_value_length(ids).to_numpy().astype(np.int64)
            flat = pc.list_flatten(ids).to_numpy().astype(np.int64)
            columns.append((lengths, np.cumsum(lengths), flat))
        full = (columns[0][0] > 0) & (columns[1][0] > 0)
        first, last, length = (
            np.stack([read(*column) for column in columns], axis=1)
            for read in (
                lambda lengths, ends, flat: flat[(ends - lengths)[full]],
                lambda lengths, ends, flat: flat[ends[full] - 1],
                lambda lengths, ends, flat: lengths[full],
            )
        )
        return cls(first, last, length)


def told_apart(ends: Ends) -> dict[str, float]:
    """Return the share of pairs that each feature alone orders rightly; ties count half.

    {} for fewer than `FEWEST` pairs.
    """
    if len(ends.last) < FEWEST:
        return {}
    longer = np.sign(ends.length[:, 0] - ends.length[:, 1]).mean()
    return {
        "last_token": _by_token(ends.last),
        "first_token": _by_token(ends.first),
        "length": float(0.5 + abs(longer) / 2),
    }


def _by_token(ids: np.ndarray) -> float:
    """How well a token's share of chosen responses, counted over all *other* pairs, orders a pair. [N, 2] -> [0, 1].

    Leaving the pair itself out, a token that stands in one pair only says nothing: else every pair with rare tokens
    would seem to be told apart.
    """
    _, tokens = np.unique(ids, return_inverse=True)
    tokens = tokens.reshape(ids.shape)
    size = int(tokens.max()) + 1
    chosen, rejected = (np.bincount(tokens[:, side], minlength=size) for side in (0, 1))
    left, right = tokens[:, 0], tokens[:, 1]
    of_chosen = (chosen[left] - 0.5) / (chosen[left] + rejected[left])
    of_rejected = (chosen[right] + 0.5) / (chosen[right] + rejected[right])
    right_order = np.where(left == right, 0, np.sign(of_chosen - of_rejected))
    return float(0.5 + right_order.mean() / 2)


def causes(ends: Ends, shares: dict[str, float]) -> dict[str, str]:
    """The features above `LIMIT`, each with what is likely behind it."""
    explain = {"last_token": _why_last, "first_token": _why_first, "length": _why_length}
    return {name: explain[name](ends) for name, share in shares.items() if share > LIMIT}


def _why_last(ends: Ends) -> str:
    (chosen, chosen_share), (rejected, rejected_share) = _commonest(ends.last)
    if chosen_share > 0.5 >= rejected_share:
        return "most rejected responses were cut, most chosen ones ended: raise sampling.max_new_tokens"
    if rejected_share > 0.5 >= chosen_share:
        return "most chosen responses were cut, most rejected ones ended: raise scoring.max_response_tokens"
    return (
        f"chosen responses end with the token {chosen}, rejected ones with {rejected}: they come from two templates, "
        "or the given texts hold an ending of their own"
    )


def _why_first(ends: Ends) -> str:
    (chosen, _), (rejected, _) = _commonest(ends.first)
    return (
        f"chosen responses begin mostly with the token {chosen}, rejected ones with {rejected}: the given texts begin "
        "with a blank or a phrase that the policy does not write, or the prompt's template differs"
    )


def _why_length(ends: Ends) -> str:
    chosen, rejected = ends.length.mean(axis=0)
    return (
        f"chosen responses have {chosen:.0f} tokens on average, rejected ones {rejected:.0f}: set scoring.pairing to "
        "length_matched, use a method that normalises by length, or raise sampling.max_new_tokens if responses were cut"
    )


def _commonest(ids: np.ndarray) -> list[tuple[int, float]]:
    """The most frequent id of each side and its share."""
    tops = [Counter(ids[:, side].tolist()).most_common(1)[0] for side in (0, 1)]
    return [(token, count / len(ids)) for token, count in tops]


def sentences(shares: dict[str, float], reasons: dict[str, str]) -> list[str]:
    """One line for each feature that tells the sides apart, for log, history and report page."""
    return [
        f"chosen and rejected can be told apart by {name.replace('_', ' ')} alone in {shares[name]:.0%} of the pairs: "
        f"{reason}"
        for name, reason in reasons.items()
    ]
