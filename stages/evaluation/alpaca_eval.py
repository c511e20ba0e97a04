r"""Stages - AlpacaEval 2: a judge's preference per instruction -> win rate and length-controlled win rate.

A preference is P(model's answer beats the baseline's) in [0, 1], as the weighted judge gives it: the probability of its first token, with
the answers named "m" and "M" in a random order. NaN: the judge failed; counted, never averaged.

Length control (Dubois et al. 2024, arXiv:2404.04475), per instruction i, without an intercept, fitted on soft labels:

    logit P_i = c + a * tanh((len_base_i - len_model_i) / sd) + b * difficulty_i        win rate = 100 mean_i sigmoid(c + b * difficulty_i)

fitted with the package's L1 penalty, |(a, b, c)|_1 / C with C of ten from 1e-4 to 1e4 by five folds. The package also fits two "gamed
baselines" (the baseline told to be verbose or concise, c = 0) with weight 0.1 each: they tie `a` down, and without them a model that is
always shorter than the baseline is extrapolated freely. They and the difficulties are in one file on the hub, df_gamed.csv: with it the
number is the leaderboard's, without it that of the package's `length_controlled_minimal`.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_contracts.errors import ConfigError
from stages.evaluation.judging import Judge, Reply, ask_all, read_lines
from stages.evaluation.logistic import fit, sigmoid
from stages.evaluation.rows import report_row

TOKENS = ("m", "M")
"""What the judge answers: the first or the second output."""


STRENGTHS, FOLDS = np.logspace(-4, 4, 10), 5


class WinRates(NamedTuple):
    """All in percent."""

    win_rate: float
    stderr: float
    length_controlled: float
    length_controlled_stderr: float
    """Instructions resampled, the penalty kept."""
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
        return WinRates(*[math.nan] * 5, 0, failed)
    y = preference[known]
    delta = (np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(lengths, dtype=np.float64))[known]
    hard = None if difficulty is None else np.asarray(difficulty, dtype=np.float64)[known]
    controlled, controlled_stderr = length_controlled(y, delta, hard, gamed)
    discrete = float(np.where(y > 0.5, 1.0, np.where(y == 0.5, 0.5, 0.0)).mean())
    stderr = float(y.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return WinRates(100 * float(y.mean()), 100 * stderr, controlled, controlled_stderr, 100 * discrete, n, failed)


def length_controlled(
    preferences: np.ndarray,
    baseline_minus_model: np.ndarray,
    difficulty: np.ndarray | None = None,
    gamed: Gamed | None = None,
    draws: int = 100,
) -> tuple[float, float]:
    """Win rate in percent, were all answers as long as the baseline's, and its standard error. Arrays [N]."""
    count = len(preferences)
    spread = baseline_minus_model.std(ddof=1) if count > 1 else 0.0
    scaled = baseline_minus_model / spread if spread > 0 else np.zeros(count)
    hard = np.zeros(count) if difficulty is None else difficulty
    own = np.stack([np.ones(count), np.tanh(scaled), hard], axis=1)
    more, more_y, weight = np.zeros((0, 3)), np.zeros(0), 0.0
    if gamed is not None:
        hard_gamed = np.zeros(len(gamed.preferences)) if difficulty is None else gamed.difficulty
        more = np.stack([np.zeros(len(hard_gamed)), np.tanh(gamed.scaled_lengths), hard_gamed], axis=1)
        more_y, weight = gamed.preferences, gamed.weight
    weights = np.concatenate([np.full(len(more), weight), np.ones(count)])
    penalty = _penalty(np.concatenate([more, own]), np.concatenate([more_y, preferences]), weights)

    def win_rate(rows: np.ndarray) -> float:
        x, y = np.concatenate([more, own[rows]]), np.concatenate([more_y, preferences[rows]])
        model, _, b = fit(x, y, weights, lasso=penalty)
        return 100 * float(sigmoid(model + b * hard[rows]).mean())

    picks = np.random.default_rng(0).integers(0, count, (draws, count))
    return win_rate(np.arange(count)), float(np.std([win_rate(rows) for rows in picks], ddof=1))


def _penalty(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The L1 penalty 1 / C under which rows that were left out are predicted best; folds as scikit-learn's GroupKFold cuts them."""
    fold = np.arange(len(y))[::-1] % FOLDS

    def loss(strength: float) -> float:
        total = 0.0
        for number in np.unique(fold):
            out = fold == number
            z = x[out] @ fit(x[~out], y[~out], weights[~out], lasso=1 / strength)
            total += float((weights[out] * (np.logaddexp(0.0, z) - y[out] * z)).mean())
        return total

    return float(1 / min(STRENGTHS, key=loss)) if len(y) >= 2 * FOLDS else 1 / STRENGTHS[-1]


def messages(template: str, instruction: str, output_1: str, output_2: str) -> list[dict[str, str]]:
    """An official prompt file (ChatML with {instruction}, {output_1}, {output_2}) as messages. Filled texts are never read as fields."""
    filled = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", template, flags=re.DOTALL)
    fill = re.compile("|".join(re.escape("{" + name + "}") for name in filled))
    return [
        {"role": role, "content": fill.sub(lambda match: filled[match[0][1:-1]], content)} for role, content in found
    ]


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
    rows = [
        report_row(
            "alpaca_eval_2", "alpaca_eval", "failed_judgments", rates.failed, rates.n + rates.failed, version=judge
        )
    ]
    if rates.n:
        for metric, value, error in (
            ("win_rate", rates.win_rate, rates.stderr),
            ("length_controlled_win_rate", rates.length_controlled, rates.length_controlled_stderr),
        ):
            low, high = value - 1.96 * error, value + 1.96 * error
            rows.append(report_row("alpaca_eval_2", "alpaca_eval", metric, value, rates.n, error, low, high, judge))
        rows.append(
            report_row("alpaca_eval_2", "alpaca_eval", "discrete_win_rate", rates.discrete, rates.n, version=judge)
        )
    return rows


class Bench(NamedTuple):
    rows: list[dict[str, Any]]
    """{"instruction", "output"}: the baseline's answers."""
    template: str
    difficulty: np.ndarray | None
    """Per row; of the package's df_gamed.csv."""
    gamed: Gamed | None


def load(directory: str | Path, limit: int | None = None) -> Bench:
    """A directory with one .json or .jsonl file of the baseline's answers, one .txt judge prompt, and df_gamed.csv if at hand. Raises: ConfigError."""
    root = Path(directory)
    answers, prompt = _only(root, ".json", ".jsonl"), _only(root, ".txt")
    rows = read_lines(answers)
    if bad := [number for number, row in enumerate(rows) if not {"instruction", "output"} <= row.keys()]:
        raise ConfigError(
            f"{answers}: row {bad[0]} has no `instruction` and `output`: the baseline's answers are needed"
        )
    template = prompt.read_text(encoding="utf-8")
    if missing := [name for name in ("{instruction}", "{output_1}", "{output_2}") if name not in template]:
        raise ConfigError(f"{prompt} has no place for {', '.join(missing)}: not a judge prompt of AlpacaEval")
    if limit is None and (root / GAMED).is_file():
        return Bench(rows, template, *_read_gamed(root / GAMED, len(rows)))
    return Bench(rows[:limit], template, None, None)


GAMED = "df_gamed.csv"


def _only(root: Path, *suffixes: str) -> Path:
    found = [path for path in sorted(root.glob("*")) if path.suffix in suffixes]
    if len(found) != 1:
        raise ConfigError(
            f"{root} must hold exactly one {' or '.join(suffixes)} file, has {[path.name for path in found]}; see docs/evaluation.md"
        )
    return found[0]


def _read_gamed(path: Path, count: int) -> tuple[np.ndarray, Gamed]:
    """Difficulty per instruction, and both gamed baselines. A preference of 0 in the package's annotations is a draw."""
    names = ("index", "preference", "std_delta_len", "instruction_difficulty")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not the package's {GAMED} with {', '.join(names)}: {error!r}") from None
    hard = dict(zip(table[:, 0].astype(int), table[:, 3], strict=True))
    if missing := set(range(count)) - hard.keys():
        raise ConfigError(
            f"{path} has no difficulty of {len(missing)} of the {count} instructions, e.g. {min(missing)}"
        )
    return np.array([hard[i] for i in range(count)]), Gamed(table[:, 1], table[:, 2], table[:, 3])
