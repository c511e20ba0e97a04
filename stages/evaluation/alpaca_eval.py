r"""Stages - AlpacaEval 2: a judge's preference per instruction -> win rate and length-controlled win rate.

A preference is P(model's answer beats the baseline's) in [0, 1], as the weighted judge gives it: the probability of its first token, with
the answers named "m" and "M" in a random order. NaN: the judge failed; counted, never averaged.

Length control (Dubois et al. 2024, arXiv:2404.04475), per instruction i, without an intercept, fitted on soft labels:

    logit P_i = c + a * tanh((len_base_i - len_model_i) / sd) + b * difficulty_i        win rate = 100 mean_i sigmoid(c + b * difficulty_i)

The package also fits two "gamed baselines" (the baseline told to be verbose or concise, c = 0) with weight 0.1 each: they tie `a` down, and
without them a model that is always shorter than the baseline is extrapolated freely. Its file of them and of the difficulties is on the hub
only: give them as `gamed` and `difficulty` to get the leaderboard's number; else the win rate is of this formula on the own rows alone.
Deviates from the package: plain maximum likelihood in place of a cross-validated L1 penalty (measured: below 0.1 points).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.evaluation.judging import Judge, Reply, ask_all, report_row
from stages.evaluation.logistic import fit, sigmoid

TOKENS = ("m", "M")
"""What the judge answers: the first or the second output."""


class WinRates(NamedTuple):
    """All in percent."""

    win_rate: float
    stderr: float
    length_controlled: float
    discrete: float
    """Preferences above 1/2 count 1, equal to it 1/2."""
    n: int
    failed: int


class Gamed(NamedTuple):
    """Annotations of gamed baselines, as df_gamed.csv has them. All [G]."""

    preferences: np.ndarray
    """In [0, 1]."""
    scaled_lengths: np.ndarray
    """Baseline minus gamed, in standard deviations."""
    difficulty: np.ndarray
    weight: float = 0.1


def win_rates(
    preferences: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
    gamed: Gamed | None = None,
) -> WinRates:
    """All [N]; lengths in characters, as the package counts them."""
    preference = np.asarray(preferences, dtype=np.float64)
    known = np.isfinite(preference)
    n, failed = int(known.sum()), int((~known).sum())
    if not n:
        return WinRates(math.nan, math.nan, math.nan, math.nan, 0, failed)
    y = preference[known]
    delta = (np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(lengths, dtype=np.float64))[known]
    controlled = length_controlled(y, delta, None if difficulty is None else np.asarray(difficulty, dtype=np.float64)[known], gamed)
    discrete = float(np.where(y > 0.5, 1.0, np.where(y == 0.5, 0.5, 0.0)).mean())
    stderr = float(y.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return WinRates(100 * float(y.mean()), 100 * stderr, controlled, 100 * discrete, n, failed)


def length_controlled(
    preferences: np.ndarray, baseline_minus_model: np.ndarray, difficulty: np.ndarray | None = None, gamed: Gamed | None = None
) -> float:
    """Win rate in percent, were all answers as long as the baseline's. Arrays [N]."""
    count = len(preferences)
    spread = baseline_minus_model.std(ddof=1) if count > 1 else 0.0
    scaled = baseline_minus_model / spread if spread > 0 else np.zeros(count)
    hard = np.zeros(count) if difficulty is None else difficulty
    x, y, weights = np.stack([np.ones(count), np.tanh(scaled), hard], axis=1), preferences, np.ones(count)
    if gamed is not None:
        hard_gamed = np.zeros(len(gamed.preferences)) if difficulty is None else gamed.difficulty
        more = np.stack([np.zeros(len(hard_gamed)), np.tanh(gamed.scaled_lengths), hard_gamed], axis=1)
        x, y = np.concatenate([x, more]), np.concatenate([y, gamed.preferences])
        weights = np.concatenate([weights, np.full(len(more), gamed.weight)])
    model, _, b = fit(x, y, weights)
    return 100 * float(sigmoid(model + b * hard).mean())


def messages(template: str, instruction: str, output_1: str, output_2: str) -> list[dict[str, str]]:
    """An official prompt file (ChatML with {instruction}, {output_1}, {output_2}) as messages. Filled texts are never read as fields."""
    filled = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", template, flags=re.DOTALL)
    fill = re.compile("|".join(re.escape("{" + name + "}") for name in filled))
    return [{"role": role, "content": fill.sub(lambda match: filled[match[0][1:-1]], content)} for role, content in found]


def is_swapped(instruction: str, seed: int = 0) -> bool:
    """Whether the model's answer is shown first: by the instruction's hash, so that it does not depend on the order of the file."""
    return hashlib.sha256(f"{seed}\0{instruction}".encode()).digest()[0] % 2 == 1


def preference(reply: Reply | None, swapped: bool) -> float:
    """P(model's answer is better). The model's answer is the second one ("M") unless swapped; NaN if the reply says neither."""
    if reply is None:
        return math.nan
    if reply.top_logprobs:
        mass = [math.exp(reply.top_logprobs[token]) if token in reply.top_logprobs else 0.0 for token in TOKENS]
        if sum(mass) == 0:
            return math.nan
        second = mass[1] / sum(mass)
    elif reply.text.strip() in TOKENS:
        second = float(reply.text.strip() == TOKENS[1])
    else:
        return math.nan
    return 1 - second if swapped else second


def annotate(judge: Judge, template: str, rows: Sequence[dict[str, Any]], seed: int = 0) -> list[float]:
    """Preferences of rows {"instruction", "output", "baseline"}; NaN where the judge failed."""
    swapped = [is_swapped(row["instruction"], seed) for row in rows]
    prompts = []
    for row, swap in zip(rows, swapped, strict=True):
        first, second = (row["output"], row["baseline"]) if swap else (row["baseline"], row["output"])
        prompts.append(messages(template, row["instruction"], first, second))
    replies = ask_all(judge, prompts, temperature=0.0, max_tokens=1, top_logprobs=5)
    return [preference(reply, swap) for reply, swap in zip(replies, swapped, strict=True)]


def report(rates: WinRates, judge: str) -> list[dict[str, Any]]:
    """Rows of eval_report, in percent as the leaderboard prints them. Nothing judged: only the count of failures."""
    rows = [report_row("alpaca_eval_2", "alpaca_eval", "failed_judgments", rates.failed, rates.n + rates.failed, version=judge)]
    if rates.n:
        low, high = rates.win_rate - 1.96 * rates.stderr, rates.win_rate + 1.96 * rates.stderr
        rows.append(report_row("alpaca_eval_2", "alpaca_eval", "win_rate", rates.win_rate, rates.n, rates.stderr, low, high, judge))
        rows.append(
            report_row("alpaca_eval_2", "alpaca_eval", "length_controlled_win_rate", rates.length_controlled, rates.n, version=judge)
        )
        rows.append(report_row("alpaca_eval_2", "alpaca_eval", "discrete_win_rate", rates.discrete, rates.n, version=judge))
    return rows
