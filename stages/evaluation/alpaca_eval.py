r"""Stages - AlpacaEval 2: a judge's preference per instruction -> win rate and length-controlled win rate.

A preference is P(model's answer beats the baseline's) in [0, 1], as the weighted judge gives it: the probability of its
first token, with the answers named "m" and "M" in a random order. NaN: the judge failed; counted, never averaged.

Length control (Dubois et al. 2024, arXiv:2404.04475), per instruction i, without an intercept, fitted on soft labels:

    logit P_i = c + a * tanh((len_base_i - len_model_i) / sd) + b * difficulty_i
    win rate  = 100 mean_i sigmoid(c + b * difficulty_i)

fitted with the package's L1 penalty, |(a, b, c)|_1 / C, with C chosen from ten values between 1e-4 and 1e4 by five-fold
cross-validation. The package also fits two "gamed baselines" (the baseline prompted to be verbose or concise, c = 0)
with weight 0.1 each: they tie `a` down, and without them a model that is always shorter than the baseline is
extrapolated freely. They and the difficulties are in one file on the hub, df_gamed.csv: with it the number is the
leaderboard's, without it that of the package's `length_controlled_minimal`.

Axes: N judged instructions, G annotations of gamed baselines, R rows of a fit, 3 coefficients (c, a, b).
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
from data_contracts.rows import ReportRow
from stages.evaluation.judging import Judge, JudgeReply, check_fields, read_rows
from stages.evaluation.logistic import fit, sigmoid
from stages.evaluation.rows import report_row
from stages.scoring.verdicts import bare_token, mass_by_token

TOKENS = ("m", "M")
"""What the judge answers: the first or the second output."""
INVERSE_PENALTIES = np.logspace(-4, 4, 10)
"""The values of C that are tried."""
FOLDS = 5
GAMED = "df_gamed.csv"


class WinRates(NamedTuple):
    """All in percent. A standard error is NaN where it is not known: one instruction was judged."""

    win_rate: float
    stderr: float
    length_controlled: float
    length_controlled_stderr: float
    """Instructions resampled, the penalty kept."""
    discrete: float
    """Preferences above 1/2 count 1, equal to it 1/2."""
    n: int
    failed: int
    wins: int = 0
    draws: int = 0
    """Preferences above and equal to 1/2, of `n`."""


class Gamed(NamedTuple):
    """Annotations of gamed baselines, as df_gamed.csv has them. Arrays [G]."""

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
    difficulty: Sequence[float] | np.ndarray | None = None,
    gamed: Gamed | None = None,
) -> WinRates:
    """The win rates over the instructions that were judged.

    All arguments have one entry per instruction, NaN as the preference where the judge failed; lengths are in
    characters, as the package counts them.
    """
    every = np.asarray(preferences, dtype=np.float64)
    judged = np.isfinite(every)
    n, failed = int(judged.sum()), int((~judged).sum())
    if not n:
        return WinRates(math.nan, math.nan, math.nan, math.nan, math.nan, 0, failed)
    preference = every[judged]
    delta = (np.asarray(baseline_lengths, dtype=np.float64) - np.asarray(lengths, dtype=np.float64))[judged]
    if difficulty is not None:
        difficulty = np.asarray(difficulty, dtype=np.float64)[judged]
    controlled, controlled_stderr = length_controlled(preference, delta, difficulty, gamed)
    wins, draws = int((preference > 0.5).sum()), int((preference == 0.5).sum())
    discrete = (wins + draws / 2) / n
    stderr = math.nan
    if n > 1:
        stderr = float(preference.std(ddof=1) / math.sqrt(n))
    win_rate = 100 * float(preference.mean())
    return WinRates(win_rate, 100 * stderr, controlled, controlled_stderr, 100 * discrete, n, failed, wins, draws)


def length_controlled(
    preferences: np.ndarray,
    baseline_minus_model: np.ndarray,
    difficulty: np.ndarray | None = None,
    gamed: Gamed | None = None,
    draws: int = 100,
) -> tuple[float, float]:
    """The win rate in percent, were all answers as long as the baseline's, and its standard error. Arrays [N].

    The standard error of one judged instruction is NaN: not known.
    """
    count = len(preferences)
    spread = baseline_minus_model.std(ddof=1) if count > 1 else 0.0
    scaled = baseline_minus_model / spread if spread > 0 else np.zeros(count)
    hardness = np.zeros(count) if difficulty is None else difficulty
    features = np.stack([np.ones(count), np.tanh(scaled), hardness], axis=1)  # [N, 3]
    gamed_features, gamed_preferences, gamed_weight = np.zeros((0, 3)), np.zeros(0), 0.0
    if gamed is not None:
        gamed_hardness = np.zeros(len(gamed.preferences)) if difficulty is None else gamed.difficulty
        constant = np.zeros(len(gamed_hardness))  # c = 0: by construction they are as good as the baseline
        gamed_features = np.stack([constant, np.tanh(gamed.scaled_lengths), gamed_hardness], axis=1)  # [G, 3]
        gamed_preferences, gamed_weight = gamed.preferences, gamed.weight
    weights = np.concatenate([np.full(len(gamed_features), gamed_weight), np.ones(count)])
    labels = np.concatenate([gamed_preferences, preferences])
    penalty = _penalty(np.concatenate([gamed_features, features]), labels, weights)

    def win_rate(rows: np.ndarray) -> float:
        x = np.concatenate([gamed_features, features[rows]])
        y = np.concatenate([gamed_preferences, preferences[rows]])
        c, _, b = fit(x, y, weights, lasso=penalty)
        return 100 * float(sigmoid(c + b * hardness[rows]).mean())

    if count == 1:
        return win_rate(np.arange(count)), math.nan
    picks = np.random.default_rng(0).integers(0, count, (draws, count))
    return win_rate(np.arange(count)), float(np.std([win_rate(rows) for rows in picks], ddof=1))


def _penalty(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The L1 penalty 1 / C under which rows that were left out are predicted best.

    x: [R, 3], y and weights: [R]. The folds are those of scikit-learn's GroupKFold. Too few rows: the smallest penalty.
    """
    if len(y) < 2 * FOLDS:
        return float(1 / INVERSE_PENALTIES[-1])
    fold = np.arange(len(y))[::-1] % FOLDS

    def loss(inverse_penalty: float) -> float:
        total = 0.0
        for number in np.unique(fold):
            out = fold == number
            z = x[out] @ fit(x[~out], y[~out], weights[~out], lasso=1 / inverse_penalty)
            total += float((weights[out] * (np.logaddexp(0.0, z) - y[out] * z)).mean())
        return total

    return float(1 / min(INVERSE_PENALTIES, key=loss))


def messages(template: str, instruction: str, output_1: str, output_2: str) -> list[dict[str, str]]:
    """An official prompt file (ChatML with {instruction}, {output_1}, {output_2}) as messages.

    A text that is filled in is never searched for fields itself.
    """
    texts = {"instruction": instruction, "output_1": output_1, "output_2": output_2}
    parts = re.findall(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", template, flags=re.DOTALL)
    field = re.compile("|".join(re.escape("{" + name + "}") for name in texts))
    return [
        {"role": role, "content": field.sub(lambda match: texts[match[0][1:-1]], content)} for role, content in parts
    ]


def is_swapped(instruction: str, seed: int = 0) -> bool:
    """Whether the model's answer is shown first: by the instruction's hash, so independent of the order of the file."""
    return hashlib.sha256(f"{seed}\0{instruction}".encode()).digest()[0] % 2 == 1


def preference(reply: JudgeReply | None, swapped: bool) -> float:
    """P(model's answer is better); NaN if there is no reply, or it says neither.

    The model's answer is the second one ("M") unless swapped.
    """
    if reply is None:
        return math.nan
    if reply.top_logprobs:
        probabilities = mass_by_token(reply.top_logprobs)
        mass = [probabilities.get(token, 0.0) for token in TOKENS]
        if sum(mass) == 0:
            return math.nan
        second = mass[1] / sum(mass)
    elif bare_token(reply.text) in TOKENS:
        second = float(bare_token(reply.text) == TOKENS[1])
    else:
        return math.nan
    if swapped:
        return 1 - second
    return second


def annotate(judge: Judge, template: str, rows: Sequence[dict[str, Any]], seed: int = 0) -> list[float]:
    """The judge's preference for each row {"instruction", "output", "baseline"}; NaN where the judge failed."""
    swapped = [is_swapped(row["instruction"], seed) for row in rows]
    prompts = []
    for row, swap in zip(rows, swapped, strict=True):
        first, second = row["baseline"], row["output"]
        if swap:
            first, second = second, first
        prompts.append(messages(template, row["instruction"], first, second))
    replies = judge.ask(prompts, temperature=0.0, max_tokens=1, top_logprobs=5)
    return [preference(reply, swap) for reply, swap in zip(replies, swapped, strict=True)]


def report(rates: WinRates, judge: str) -> list[ReportRow]:
    """Rows of eval_report, in percent as the leaderboard prints them. Nothing judged: only the count of failures."""

    def row(metric: str, value: float, n: int, *interval: float) -> ReportRow:
        return report_row("alpaca_eval_2", "alpaca_eval", metric, value, n, *interval, version=judge)

    rows = [row("failed_judgments", rates.failed, rates.n + rates.failed)]
    if rates.n:
        for metric, value, stderr in (
            ("win_rate", rates.win_rate, rates.stderr),
            ("length_controlled_win_rate", rates.length_controlled, rates.length_controlled_stderr),
        ):
            rows.append(row(metric, value, rates.n, stderr, value - 1.96 * stderr, value + 1.96 * stderr))
        rows.append(row("discrete_win_rate", rates.discrete, rates.n))
    return rows


class Bench(NamedTuple):
    """The files of the benchmark."""

    rows: list[dict[str, Any]]
    """{"instruction", "output"}: the baseline's answers."""
    template: str
    difficulty: np.ndarray | None
    """Of each row, from the package's df_gamed.csv."""
    gamed: Gamed | None


def load(directory: str | Path, limit: int | None = None) -> Bench:
    """Read one .json or .jsonl file of the baseline's answers, one .txt judge prompt, and df_gamed.csv if it is there.

    Raises: ConfigError.
    """
    root = Path(directory)
    answers_path, prompt_path = _single_file(root, ".json", ".jsonl"), _single_file(root, ".txt")
    rows = read_rows(answers_path)
    check_fields(answers_path, rows, ("instruction", "output"))  # the baseline's answers
    template = _read_template(prompt_path)
    if limit is None and (root / GAMED).is_file():
        return Bench(rows, template, *_read_gamed(root / GAMED, len(rows)))
    return Bench(rows[:limit], template, None, None)


def _read_template(path: Path) -> str:
    """A judge prompt in ChatML. Raises: ConfigError without its marks, or without a place for the answers."""
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the judge's prompt {path}: {error}") from None
    asked = "".join(message["content"] for message in messages(template, "{instruction}", "{output_1}", "{output_2}"))
    if not asked:
        raise ConfigError(
            f"{path} has no message between `<|im_start|>ROLE` and `<|im_end|>`: not a judge prompt of AlpacaEval, "
            "whose files keep these marks"
        )
    if missing := [name for name in ("{instruction}", "{output_1}", "{output_2}") if name not in asked]:
        raise ConfigError(f"{path} has no place for {', '.join(missing)}: not a judge prompt of AlpacaEval")
    return template


def _single_file(root: Path, *suffixes: str) -> Path:
    paths = [path for path in sorted(root.glob("*")) if path.suffix in suffixes]
    if len(paths) != 1:
        names = [path.name for path in paths]
        raise ConfigError(
            f"{root} must hold exactly one {' or '.join(suffixes)} file, has {names}; see docs/evaluation.md"
        )
    return paths[0]


def _read_gamed(path: Path, count: int) -> tuple[np.ndarray, Gamed]:
    """The difficulty of each of `count` instructions, and the annotations of both gamed baselines."""
    names = ("index", "preference", "std_delta_len", "instruction_difficulty")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = np.array([[float(row[name]) for name in names] for row in csv.DictReader(file)])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path} is not the package's {GAMED} with {', '.join(names)}: {error!r}") from None
    difficulty = dict(zip(table[:, 0].astype(int), table[:, 3], strict=True))
    if missing := set(range(count)) - difficulty.keys():
        raise ConfigError(
            f"{path} has no difficulty of {len(missing)} of the {count} instructions, e.g. {min(missing)}"
        )
    return np.array([difficulty[i] for i in range(count)]), Gamed(table[:, 1], table[:, 2], table[:, 3])
