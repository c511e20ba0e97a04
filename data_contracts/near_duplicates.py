r"""Contracts - texts that are nearly the same: an exact search by Jaccard similarity of n-grams, and the check of
held-out prompts with it.

    similarity(x, y) = |X n Y| / |X u Y|      X, Y: the sets of the texts' n-grams, without case and punctuation

n-grams are triples of words; in scripts that put no spaces between words (Chinese, Japanese, Thai, ...) they are single
characters and pairs of neighbours, so that one character of seventeen may differ at similarity 0.8.

A long instruction that many prompts begin with would make all of them similar. n-grams that more than ten of the left
texts share (of large sets, 2 %, but at most 50 texts) are therefore not enough: without them, two texts must still
reach half of the threshold.

Only pairs that can reach the threshold are compared: two sets of Jaccard similarity >= t share at least ceil(t |X|)
elements, so at least one of any |X| - ceil(t |X|) + 1 elements of X is in Y (prefix filtering; Chaudhuri et al. 2006,
Bayardo et al. 2007). The left texts are indexed by that many of their rarest n-grams, and the right ones pass by once.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from data_contracts.errors import ConfigError
from data_contracts.prompts import has_written_id, name_of, text_of

Grams = frozenset[int]
"""Hashes of n-grams. Of 64 bits: that two of a million differ in truth has the probability 10^-8."""

WORDS = re.compile(r"\w+")
UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Myanmar, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "]+"
)
SHARED_BY = 10
"""Texts that may have an n-gram in common before it counts as a part of an instruction."""


class NearDuplicate(NamedTuple):
    """A pair of similar texts."""

    left: int
    right: int
    similarity: float


def n_grams(text: str) -> Grams:
    """The n-grams of a text; of a text without words, the empty one alone."""
    text = text.casefold()
    runs = [] if text.isascii() else UNSPACED.findall(text)
    words = WORDS.findall(UNSPACED.sub(" ", text) if runs else text)
    grams: set[int] = set()
    if len(words) > 2:
        grams.update(map(hash, zip(words, words[1:], words[2:], strict=False)))
    elif words or not runs:
        grams.add(hash(tuple(words)))
    for run in runs:
        grams.update(map(hash, run))
        grams.update(map(hash, pairwise(run)))
    return frozenset(grams)


class NearDuplicateIndex:
    """Texts to search among, by the rarest n-grams of each."""

    def __init__(self, texts: Iterable[str], threshold: float):
        self.threshold = threshold
        self.grams = [n_grams(text) for text in texts]
        counts = Counter(gram for grams in self.grams for gram in grams)
        most = max(SHARED_BY, min(len(self.grams) // 50, 5 * SHARED_BY))
        self.shared = frozenset(gram for gram, count in counts.items() if count > most)
        self.distinct = [grams - self.shared for grams in self.grams]
        self.distinct_threshold = threshold / 2 if self.shared else threshold
        self.without_distinct = [number for number, grams in enumerate(self.distinct) if not grams]
        self.by_gram: dict[int, list[int]] = defaultdict(list)
        for number, grams in enumerate(self.distinct):
            enough = len(grams) - math.ceil(self.distinct_threshold * len(grams) - 1e-9) + 1
            for gram in sorted(grams, key=counts.__getitem__)[:enough]:
                self.by_gram[gram].append(number)
        self.indexed = frozenset(self.by_gram)

    def similar_to(self, text: str) -> list[tuple[int, float]]:
        """Number and similarity of each indexed text that reaches the threshold, in order."""
        grams = n_grams(text)
        candidates = {number for gram in grams & self.indexed for number in self.by_gram[gram]}
        if self.without_distinct and grams <= self.shared:
            candidates.update(self.without_distinct)
        return [
            (number, similarity)
            for number in sorted(candidates)
            if (similarity := jaccard(grams, self.grams[number])) >= self.threshold
            and jaccard(grams - self.shared, self.distinct[number]) >= self.distinct_threshold
        ]


def jaccard(left: Grams, right: Grams) -> float:
    """|X n Y| / |X u Y|; of two empty sets, 1."""
    common = len(left & right)
    union = len(left) + len(right) - common
    if union:
        return common / union
    return 1.0


def near_duplicates(left: Iterable[str], right: Iterable[str], threshold: float) -> list[NearDuplicate]:
    """Return the pairs whose similarity is at least `threshold`, sorted.

    `left` is held in memory, `right` is streamed.
    """
    index = NearDuplicateIndex(left, threshold)
    pairs = [
        NearDuplicate(left_number, right_number, similarity)
        for right_number, text in enumerate(right)
        for left_number, similarity in index.similar_to(text)
    ]
    return sorted(pairs)


def check_disjoint(
    train: Iterable[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]], threshold: float = 0.8
) -> None:
    """Refuse a held-out prompt that also trains: measuring on it would measure memory. `train` passes by once.

    Raises: ConfigError naming the first offenders.
    """
    index = NearDuplicateIndex(map(text_of, heldout), threshold)
    heldout_ids = {row["prompt_id"] for row in heldout}
    common_ids: set[str] = set()
    similar: set[int] = set()
    closest, example = -1.0, ""
    for row in train:
        if row["prompt_id"] in heldout_ids and has_written_id(row):
            common_ids.add(row["prompt_id"])
        for number, similarity in index.similar_to(text_of(row)):
            similar.add(number)
            if similarity > closest:
                closest, example = similarity, f"{name_of(heldout[number])} and {name_of(row)}"
    if common_ids:
        raise ConfigError(
            f"{len(common_ids)} prompt id(s) are both in the training and in the held-out file, "
            f"e.g. {sorted(common_ids)[:3]}: give them other ids, or leave them out in one of the two"
        )
    if similar:
        raise ConfigError(
            f"{len(similar)} held-out prompt(s) are (nearly) in the training set, e.g. {example} "
            f"(similarity {closest:.2f}, limit {threshold}): remove one of each pair"
        )
