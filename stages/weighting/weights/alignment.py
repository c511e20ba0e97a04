"""Stages - two tokenizations of one text, matched through its characters: components, and the component of each token.

A component is a word with at most one leading space, or a run of other whitespace ("[SPACE]"); components that a token
of either tokenizer crosses are merged. Everything is decided on character spans, never on token strings, and for all
responses of a batch at once.
Axes: N texts, C characters of all of them, S and R tokens of the two tokenizations, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_contracts.errors import ContractError
from stages.weighting.weights.base import Tokens, row_starts

IS_SPACE = np.array([chr(point).isspace() for point in range(0x3001)])
"""str.isspace() of every code point that can be whitespace; U+3000 is the last."""
PAIRS_AT_ONCE = 1 << 22
"""Student-teacher token pairs in memory at a time; a text without spaces is one component with |S| |T| of them."""


class Alignment(NamedTuple):
    """The components of N texts, and the component of each token of two tokenizations."""

    starts: np.ndarray
    """int64 [K]: first character of each component, counted over the whole batch."""
    ends: np.ndarray
    """int64 [K]: the character behind each component."""
    rows: np.ndarray
    """int64 [K]: which text it belongs to."""
    is_space: np.ndarray
    """bool [K]: [SPACE] components."""
    student: np.ndarray
    """int64 [S]: component of each student token; -1 for an EOS, in an empty text, and in one that is not aligned."""
    teacher: np.ndarray
    """int64 [R]: the same for each teacher token."""
    text_starts: np.ndarray
    """int64 [N + 1]: first character of each text, counted over the whole batch."""
    aligned: np.ndarray
    """bool [N]: False where spans are missing, run backwards or leave the text."""

    def merge(self, cut: np.ndarray) -> Alignment:
        """Keep only the borders before the components where `cut` [K] is True; a text's first component stays one."""
        number = np.cumsum(cut) - 1
        first = np.flatnonzero(cut)
        last = np.append(first[1:], len(cut)) - 1
        new_number = np.append(number, -1)  # -1 stays -1
        return self._replace(
            starts=self.starts[first],
            ends=self.ends[last],
            rows=self.rows[first],
            is_space=_all_in_each(self.is_space, first),
            student=new_number[self.student],
            teacher=new_number[self.teacher],
        )


def align(texts: Sequence[str], student: Tokens, teacher: Tokens, segmenter: str = "word") -> Alignment:
    """Match the tokens of each text.

    segmenter: `word`, or `common_starts` (cut wherever a token starts in both tokenizations).
    Raises: ContractError if the two tokenizations are not of the same texts, or have no spans at all.

    >>> def tokens(spans): return Tokens.of([range(len(spans))], [spans], ended=[False])
    >>> alignment = align(["a bee"], tokens([(0, 1), (1, 5)]), tokens([(0, 2), (2, 3), (3, 5)]))
    >>> alignment.student.tolist(), alignment.teacher.tolist()  # the teacher's "a " joins the words "a" and " bee"
    ([0, 0], [0, 0, 0])
    >>> alignment = align(["a bee"], tokens([(0, 1), (1, 5)]), tokens([(0, 1), (1, 3), (3, 5)]))
    >>> alignment.student.tolist(), alignment.teacher.tolist()  # "a" and "a"; " bee" and " b", "ee"
    ([0, 1], [0, 1, 1])
    """
    if not len(texts) == len(student.starts) - 1 == len(teacher.starts) - 1:
        raise ContractError(
            f"{len(texts)} texts, {len(student.starts) - 1} student and {len(teacher.starts) - 1} teacher tokenizations"
        )
    text_starts = row_starts([len(text) for text in texts])
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    is_space = IS_SPACE[np.minimum(points, len(IS_SPACE) - 1)] & (points < len(IS_SPACE))
    sides = (_place(student, text_starts), _place(teacher, text_starts))
    aligned = sides[0].is_usable & sides[1].is_usable
    if segmenter == "word":
        cut = _word_cuts(points, is_space, text_starts)
    else:
        cut = _token_starts(sides[0], len(points), aligned) & _token_starts(sides[1], len(points), aligned)
        cut[text_starts[:-1][np.diff(text_starts) > 0]] = True
    for side in sides:
        _drop_crossed_borders(cut, side, aligned)
    starts = np.flatnonzero(cut)
    component = np.append(np.cumsum(cut) - 1, -1)  # the last entry is that of a batch without characters
    return Alignment(
        starts=starts,
        ends=np.append(starts[1:], len(points))[: len(starts)],
        rows=np.repeat(np.arange(len(texts)), np.diff(text_starts))[starts],
        is_space=_all_in_each(is_space, starts),
        student=np.where(sides[0].is_inside & aligned[sides[0].rows], component[sides[0].position], -1),
        teacher=np.where(sides[1].is_inside & aligned[sides[1].rows], component[sides[1].position], -1),
        text_starts=text_starts,
        aligned=aligned,
    )


def _all_in_each(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """bool: whether all `values` are True in each of the segments that begin at `starts`."""
    if not len(starts):
        return np.zeros(0, dtype=bool)
    return np.logical_and.reduceat(values, starts)


class _Side(NamedTuple):
    """The S tokens of one tokenization, with spans counted over the whole batch."""

    starts: np.ndarray
    """int64 [S]: first character of each token."""
    ends: np.ndarray
    """int64 [S]: the character behind it."""
    rows: np.ndarray
    """int64 [S]: its text."""
    position: np.ndarray
    """int64 [S]: a character inside the token: its first; of a zero-width one that behind it, or the text's last."""
    is_inside: np.ndarray
    """bool [S]: the token lies in a text that has characters, and is no EOS."""
    is_usable: np.ndarray
    """bool [N]: the text's spans are there, run forwards and stay in the text."""


def _place(tokens: Tokens, text_starts: np.ndarray) -> _Side:
    """The tokens' spans, counted over the whole batch. Raises: ContractError without spans."""
    if tokens.spans is None:
        raise ContractError(
            "a tokenization without character offsets cannot be aligned: use a tokenizer with a fast (tokenizers) "
            "backend"
        )
    rows, has_text = tokens.rows(), ~tokens.is_eos()
    begin, end = text_starts[rows], text_starts[rows + 1]
    starts, ends = begin + tokens.spans[:, 0], begin + tokens.spans[:, 1]
    is_wrong = has_text & ((tokens.spans[:, 0] < 0) | (starts > ends) | (ends > end))
    # Zero-width tokens may report (0, 0) anywhere; the others must not run backwards.
    wide = np.flatnonzero(has_text & (starts < ends))
    goes_back = (np.diff(starts[wide]) < 0) | (np.diff(ends[wide]) < 0)
    is_usable = np.ones(len(text_starts) - 1, dtype=bool)
    if tokens.aligned is not None:
        is_usable = tokens.aligned.copy()
    is_usable[rows[is_wrong]] = False
    is_usable[rows[wide[1:][goes_back & (np.diff(rows[wide]) == 0)]]] = False
    position = np.clip(np.minimum(starts, end - 1), 0, max(int(text_starts[-1]) - 1, 0))
    return _Side(starts, ends, rows, position, has_text & (end > begin), is_usable)


def _word_cuts(points: np.ndarray, is_space: np.ndarray, text_starts: np.ndarray) -> np.ndarray:
    """Where components begin, by the rule that exactly one plain space before a word belongs to it. bool [C]."""
    is_first = np.zeros(len(points), dtype=bool)
    is_first[text_starts[:-1][np.diff(text_starts) > 0]] = True
    is_last = np.append(is_first[1:], True)[: len(points)]
    after_space = np.append(False, is_space[:-1]) & ~is_first
    after_plain_space = np.append(False, points[:-1] == 0x20) & after_space
    before_word = np.append(~is_space[1:], False) & ~is_last
    run_starts = is_space & ~after_space
    word_space = is_space & (points == 0x20) & before_word  # the last space of a run, given to the word behind it
    word_starts = ~is_space & after_space & ~after_plain_space
    return is_first | run_starts | word_space | word_starts


def _token_starts(side: _Side, size: int, aligned: np.ndarray) -> np.ndarray:
    """bool [C]: characters at which a token of this side begins, in texts that are aligned."""
    begins = np.zeros(size, dtype=bool)
    begins[side.position[side.is_inside & aligned[side.rows] & (side.starts == side.position)]] = True
    return begins


def _drop_crossed_borders(cut: np.ndarray, side: _Side, aligned: np.ndarray) -> None:
    """Drop, in place, every border that a token crosses. One pass is enough: merging makes no new border."""
    wide = side.is_inside & aligned[side.rows] & (side.ends - side.starts > 1)
    opened = np.bincount(side.starts[wide] + 1, minlength=len(cut) + 1)
    closed = np.bincount(side.ends[wide], minlength=len(cut) + 1)
    cut &= np.cumsum(opened - closed)[: len(cut)] == 0


def merge_empty(alignment: Alignment, is_scored: np.ndarray) -> Alignment:
    """Join each component without a scored teacher token (`is_scored` bool [R]) to the next one of its text.

    At the end of a text, where there is no next one, it joins the previous one.
    """
    count = len(alignment.starts)
    if not count:
        return alignment
    is_empty = np.bincount(alignment.teacher[is_scored & (alignment.teacher >= 0)], minlength=count) == 0
    is_first = np.append(True, alignment.rows[1:] != alignment.rows[:-1])
    cut = is_first | ~np.append(False, is_empty[:-1])
    # The components behind the last full one of a text have no next one: they join it.
    full = np.flatnonzero(~is_empty)
    last_full = np.full(alignment.rows[-1] + 1, -1)
    last_full[alignment.rows[full]] = full
    cut &= is_first | (np.arange(count) <= last_full[alignment.rows]) | (last_full[alignment.rows] < 0)
    return alignment.merge(cut)


def pair_means(
    alignment: Alignment,
    student: np.ndarray,
    teacher: np.ndarray,
    weight: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of weight(a_r - b_i, i) over the teacher tokens r of student token i's component (SWIFT, Eq. 6).

    Args: log-probs, student [S] and teacher [R] (NaN: not scored); weight: vectorised over token pairs. Returns: the
    means [S], NaN where a component has no scored teacher token; and how many it has [S].
    """
    usable = np.flatnonzero((alignment.teacher >= 0) & ~np.isnan(teacher))
    order = usable[np.argsort(alignment.teacher[usable], kind="stable")]
    values = teacher[order]
    # The last count is component -1's: 0.
    counts = np.bincount(alignment.teacher[order], minlength=len(alignment.starts) + 1)
    offsets = np.cumsum(counts) - counts
    number = counts[alignment.student]
    means = np.full(len(student), np.nan)
    ends = np.cumsum(number)
    begin = 0
    while begin < len(student):
        pairs_before = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, pairs_before + PAIRS_AT_ONCE, side="right")), begin + 1)
        paired = np.flatnonzero(number[begin:stop]) + begin
        if len(paired):
            repeats = number[paired]
            heads = np.cumsum(repeats) - repeats
            partners = np.repeat(offsets[alignment.student[paired]] - heads, repeats) + np.arange(repeats.sum())
            tokens = np.repeat(paired, repeats)
            means[paired] = np.add.reduceat(weight(values[partners] - student[tokens], tokens), heads) / repeats
        begin = stop
    return means, number
