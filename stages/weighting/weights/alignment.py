"""Stages - two tokenizations of one text, matched through its characters: components, and who belongs to which.

A component is a word with at most one leading space, or a run of other whitespace ("[SPACE]"); components that a token of either
tokenizer crosses are merged. Everything is decided on character spans, never on token strings, and for all responses of a batch at once.
Axes: N texts, C characters of all of them, S and R tokens of the two tokenizations, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_contracts.errors import ContractError
from stages.weighting.weights.base import Tokens, row_starts

SPACES = np.array([chr(point).isspace() for point in range(0x3001)])
"""str.isspace() of every code point that can be whitespace; U+3000 is the last."""
PAIRS_AT_ONCE = 1 << 22
"""Student-teacher token pairs in memory at a time; a text without spaces is one component with |S| |T| of them."""


class Alignment(NamedTuple):
    starts: np.ndarray
    """int64 [K]: first character of each component, counted over the whole batch."""
    ends: np.ndarray
    """int64 [K]."""
    rows: np.ndarray
    """int64 [K]: which text it belongs to."""
    is_space: np.ndarray
    """bool [K]: [SPACE] components."""
    student: np.ndarray
    """int64 [S]: component of each student token; -1 for an EOS, for an empty text, and where a text could not be aligned."""
    teacher: np.ndarray
    """int64 [R]."""
    text_starts: np.ndarray
    """int64 [N + 1]: first character of each text, counted over the whole batch."""
    aligned: np.ndarray
    """bool [N]: False where spans are missing, run backwards or leave the text."""

    def merge(self, cut: np.ndarray) -> Alignment:
        """Keep only the borders before the components where `cut` [K] is True; a text's first component stays one."""
        number = np.cumsum(cut) - 1
        first = np.flatnonzero(cut)
        last = np.append(first[1:], len(cut)) - 1
        spaces = np.logical_and.reduceat(self.is_space, first) if len(first) else self.is_space[:0]
        renumber = np.append(number, -1)  # -1 stays -1
        return self._replace(
            starts=self.starts[first],
            ends=self.ends[last],
            rows=self.rows[first],
            is_space=spaces,
            student=renumber[self.student],
            teacher=renumber[self.teacher],
        )


def align(texts: Sequence[str], student: Tokens, teacher: Tokens, segmenter: str = "word") -> Alignment:
    """Match the tokens of each text. `segmenter`: word, or common_starts (cut wherever a token starts in both tokenizations).

    Raises: ContractError if the two tokenizations are not of the same texts, or have no spans at all.
    """
    if not len(texts) == len(student.starts) - 1 == len(teacher.starts) - 1:
        raise ContractError(
            f"{len(texts)} texts, {len(student.starts) - 1} student and {len(teacher.starts) - 1} teacher tokenizations"
        )
    text_starts = row_starts([len(text) for text in texts])
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    space = SPACES[np.minimum(points, len(SPACES) - 1)] & (points < len(SPACES))
    sides = [_place(tokens, text_starts) for tokens in (student, teacher)]
    usable = sides[0].usable & sides[1].usable
    if segmenter == "word":
        cut = _word_cuts(points, space, text_starts)
    else:
        cut = _token_starts(sides[0], len(points), usable) & _token_starts(sides[1], len(points), usable)
        cut[text_starts[:-1][np.diff(text_starts) > 0]] = True
    for side in sides:
        _close(cut, side, usable)
    starts = np.flatnonzero(cut)
    component = np.cumsum(cut) - 1
    rows = np.repeat(np.arange(len(texts)), np.diff(text_starts))[starts]
    is_space = np.logical_and.reduceat(space, starts) if len(starts) else np.zeros(0, dtype=bool)
    indices = [
        np.where(side.inside & usable[side.rows], component[side.position], -1)
        if len(points)
        else np.full(len(side.rows), -1)
        for side in sides
    ]
    return Alignment(
        starts, np.append(starts[1:], len(points))[: len(starts)], rows, is_space, *indices, text_starts, usable
    )


class _Side(NamedTuple):
    """Tokens with spans counted over the whole batch."""

    starts: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    position: np.ndarray
    """A character inside the token: its first one, or for a zero-width token the one it stands before, or the text's last."""
    inside: np.ndarray
    """bool: the token lies in a text that has characters, and is no EOS."""
    usable: np.ndarray
    """bool [N]."""


def _place(tokens: Tokens, text_starts: np.ndarray) -> _Side:
    if tokens.spans is None:
        raise ContractError(
            "a tokenization without character offsets cannot be aligned: use a tokenizer with a fast (tokenizers) backend"
        )
    rows, real = tokens.rows(), ~tokens.is_eos()
    begin, end = text_starts[rows], text_starts[rows + 1]
    starts, ends = begin + tokens.spans[:, 0], begin + tokens.spans[:, 1]
    wrong = real & ((tokens.spans[:, 0] < 0) | (starts > ends) | (ends > end))
    # Zero-width tokens may report (0, 0) anywhere; the others must not run backwards.
    wide = np.flatnonzero(real & (starts < ends))
    back = (np.diff(starts[wide]) < 0) | (np.diff(ends[wide]) < 0)
    usable = np.ones(len(text_starts) - 1, dtype=bool) if tokens.aligned is None else tokens.aligned.copy()
    usable[rows[wrong]] = False
    usable[rows[wide[1:][back & (np.diff(rows[wide]) == 0)]]] = False
    position = np.clip(np.minimum(starts, end - 1), 0, max(int(text_starts[-1]) - 1, 0))
    return _Side(starts, ends, rows, position, real & (end > begin), usable)


def _word_cuts(points: np.ndarray, space: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """Where components begin, by the rule that exactly one plain space before a word belongs to it. bool [C]."""
    first = np.zeros(len(points), dtype=bool)
    first[text_starts[:-1][np.diff(text_starts) > 0]] = True
    last = np.append(first[1:], True)[: len(points)]
    after_space = np.append(False, space[:-1]) & ~first
    after_plain = np.append(False, points[:-1] == 0x20) & after_space
    before_word = np.append(~space[1:], False) & ~last
    run_starts = space & ~after_space
    word_space = space & (points == 0x20) & before_word  # the last space of a run, given to the word behind it
    word_starts = ~space & after_space & ~after_plain
    return first | run_starts | word_space | word_starts


def _token_starts(side: _Side, size: int, usable: np.ndarray) -> np.ndarray:
    found = np.zeros(size, dtype=bool)
    found[side.position[side.inside & usable[side.rows] & (side.starts == side.position)]] = True
    return found


def _close(cut: np.ndarray, side: _Side, usable: np.ndarray) -> None:
    """Drop every border that a token crosses. One pass is the closure: merging makes no new border."""
    wide = side.inside & usable[side.rows] & (side.ends - side.starts > 1)
    depth = np.bincount(side.starts[wide] + 1, minlength=len(cut) + 1) - np.bincount(
        side.ends[wide], minlength=len(cut) + 1
    )
    cut &= np.cumsum(depth)[: len(cut)] == 0


def merge_empty(alignment: Alignment, scored: np.ndarray) -> Alignment:
    """Join each component without a scored teacher token (`scored` bool [R]) to the next one, at the end of a text to the previous one."""
    count = len(alignment.starts)
    if not count:
        return alignment
    empty = np.bincount(alignment.teacher[scored & (alignment.teacher >= 0)], minlength=count) == 0
    first = np.append(True, alignment.rows[1:] != alignment.rows[:-1])
    cut = first | ~np.append(False, empty[:-1])
    # The components behind the last full one of a text have no next one: they join it.
    full = np.flatnonzero(~empty)
    last_full = np.full(alignment.rows[-1] + 1, -1)
    last_full[alignment.rows[full]] = full
    cut &= first | (np.arange(count) <= last_full[alignment.rows]) | (last_full[alignment.rows] < 0)
    return alignment.merge(cut)


def pair_means(
    alignment: Alignment,
    student: np.ndarray,
    teacher: np.ndarray,
    weight: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of weight(a_r - b_i, i) over the teacher tokens r of student token i's component (SWIFT, Eq. 6).

    Args: student [S] and teacher [R] log-probs, teacher NaN: not scored; weight: vectorised over token pairs. Returns: means [S], NaN
    where a component has no scored teacher token; and how many it has [S].
    """
    usable = np.flatnonzero((alignment.teacher >= 0) & ~np.isnan(teacher))
    order = usable[np.argsort(alignment.teacher[usable], kind="stable")]
    values = teacher[order]
    counts = np.bincount(
        alignment.teacher[order], minlength=len(alignment.starts) + 1
    )  # the last one is component -1's: 0
    offsets = np.cumsum(counts) - counts
    number = counts[alignment.student]
    means = np.full(len(student), np.nan)
    ends = np.cumsum(number)
    begin = 0
    while begin < len(student):
        done = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, done + PAIRS_AT_ONCE, side="right")), begin + 1)
        some = np.flatnonzero(number[begin:stop]) + begin
        if len(some):
            repeats = number[some]
            heads = np.cumsum(repeats) - repeats
            which = np.repeat(offsets[alignment.student[some]] - heads, repeats) + np.arange(repeats.sum())
            tokens = np.repeat(some, repeats)
            means[some] = np.add.reduceat(weight(values[which] - student[tokens], tokens), heads) / repeats
        begin = stop
    return means, number
