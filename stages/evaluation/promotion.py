r"""Stages - is this policy better than that one? A paired, length-controlled decision over held-out prompts.

Model of the differences, one per held-out prompt i, with d_i = score_after - score_before and
l_i = tokens_after - tokens_before:

    d_i = gain + slope * tanh(l_i / sd(l)) + noise_i

`gain` is the difference at equal length, as AlpacaEval 2 controls for length inside its logistic model. Its interval
comes from resampling prompts, pairs kept. Prompts that either side could not score are counted and left out.

How many prompts: the smallest true gain that is seen in a fraction `power` of all runs is
(1.96 + z_power) * sd(d) / sqrt(N). `prompts_needed` plans with a power of 85 %: for five points 8.98 * (sd / 0.05)^2
prompts, e.g. 324 at sd 0.3 (the quickstart's) and 898 at sd 0.5.

Axes: N held-out prompts, R resamples of them. Pure numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from data_contracts.config import Runtime
from data_contracts.rows import HeldoutRow, ReportRow
from stages.evaluation.intervals import Interval
from stages.evaluation.rows import column_names

PROMOTE, KEEP_GOING, ROLL_BACK, STOP = "promote", "keep going", "roll back", "stop"
Outcome = Literal["promote", "keep going", "roll back", "stop"]
DRAWS = 2000
"""Bootstrap resamples of the prompts."""


class GateConfig(Runtime):
    """What happens with a candidate that did not beat the best policy so far.

    It changes no artifact, only which policy goes on.
    """

    enabled: bool = False
    """Act on the decision. Off: it is taken and recorded all the same."""
    level: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the interval of the gain."""
    length_controlled: bool = True
    """Compare at equal length; off: the plain mean difference."""
    min_gain: float = Field(default=0.0, ge=0)
    """The whole interval must lie above this."""
    max_benchmark_drop: float | None = Field(default=None, ge=0)
    """Roll back if a benchmark is below the best policy's by more than this and by more than two standard errors."""
    patience: int = Field(default=2, ge=1)
    """Stop after so many iterations in a row without a promotion."""
    min_prompts: int = Field(default=20, ge=2)
    """Fewer scored pairs than this decide nothing."""


class Decision(NamedTuple):
    """What becomes of a candidate, and the numbers behind it."""

    outcome: Outcome
    reason: str
    gain: Interval | None
    """As the gate compares: length-controlled, if so set. None: too few scored pairs."""
    plain: Interval | None
    """Without control for length."""
    prompts: int
    unscored: int
    """Held-out prompts without a score on one of the two sides."""
    detectable: float | None
    """The smallest true gain that this many prompts show in 80 % of all runs."""


class Measurement(NamedTuple):
    """A policy as the gate sees it."""

    scores: Mapping[str, float]
    """Mean score of each held-out prompt that could be scored."""
    tokens: Mapping[str, float]
    """Mean length of the answers to each held-out prompt."""
    benchmarks: Mapping[str, tuple[float, float | None]] = {}
    """Name -> (value, standard error); larger is better."""

    @classmethod
    def from_rows(cls, heldout: Sequence[HeldoutRow], report: Sequence[ReportRow]) -> Measurement:
        """Read the rows of `heldout` and `eval_report`.

        A benchmark is every number of the report that has a standard error and is not about the held-out prompts.
        """
        scores: dict[str, list[float]] = {}
        tokens: dict[str, list[float]] = {}
        for row in heldout:
            tokens.setdefault(row["prompt_id"], []).append(float(row["num_tokens"]))
            if row["score"] is not None:
                scores.setdefault(row["prompt_id"], []).append(float(row["score"]))
        benchmarks = {
            name: (row["value"], row["stderr"])
            for name, row in zip(column_names(report), report, strict=True)
            if row["suite"] != "heldout" and row["stderr"] is not None
        }
        return cls(_means(scores), _means(tokens), benchmarks)


def _means(groups: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in groups.items()}


def paired_gain(
    difference: np.ndarray, lengths: np.ndarray | None = None, seed: int = 0, level: float = 0.95, draws: int = DRAWS
) -> Interval:
    """Interval of the mean difference, at equal length if the length differences are given. Both [N].

    A resample in which all lengths are alike has no slope: its gain is the plain mean.
    """
    if lengths is None:
        return paired_gains(difference, np.zeros(len(difference)), seed, level, draws)[0]
    return paired_gains(difference, lengths, seed, level, draws)[1]


def paired_gains(
    difference: np.ndarray, lengths: np.ndarray, seed: int = 0, level: float = 0.95, draws: int = DRAWS
) -> tuple[Interval, Interval]:
    """The mean difference and the gain at equal length, over the same resamples. Arrays [N]."""
    difference = np.asarray(difference, dtype=np.float64)
    term = length_term(np.asarray(lengths, dtype=np.float64))
    picks = np.random.default_rng(seed).integers(0, len(difference), size=(draws, len(difference)))
    resampled = difference[picks]  # [R, N]
    plain = controlled = resampled.mean(axis=1)
    if term.any():
        controlled = _intercept(term[picks], resampled)
    gain = float(_intercept(term[None], difference[None])[0])
    return _interval(float(difference.mean()), plain, level), _interval(gain, controlled, level)


def _interval(mean: float, draws: np.ndarray, level: float) -> Interval:
    """Percentile interval of resampled means. draws: [R]."""
    tail = (1 - level) / 2
    low, high = float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))
    return Interval(mean, low, high, float(draws.std(ddof=1)))


def length_term(lengths: np.ndarray) -> np.ndarray:
    """tanh(l / sd(l)): long tails count no more than two standard deviations do; 0 where both are as long. [N]."""
    spread = float(lengths.std())
    if spread == 0:
        return np.zeros_like(lengths)
    return np.tanh(lengths / spread)


def _intercept(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The `a` of the least squares fit y = a + b x along the last axis. [R, N] -> [R]."""
    x_mean, y_mean = x.mean(axis=-1), y.mean(axis=-1)
    variance = (x * x).mean(axis=-1) - x_mean**2
    covariance = (x * y).mean(axis=-1) - x_mean * y_mean
    slope = np.divide(covariance, variance, out=np.zeros_like(covariance), where=variance > 1e-12)
    return y_mean - slope * x_mean


def prompts_needed(spread: float, gain: float = 0.05, power: float = 0.85, level: float = 0.95) -> int:
    """The number of held-out prompts with which a true gain is seen in a fraction `power` of all runs.

    spread: standard deviation of the differences.
    """
    return math.ceil((_z(level, power) * spread / gain) ** 2)


def detectable_gain(spread: float, prompts: int, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true gain that so many prompts show in a fraction `power` of all runs."""
    return _z(level, power) * spread / math.sqrt(prompts)


def _z(level: float, power: float) -> float:
    """The gain that is seen, in standard errors."""
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)


def decide(
    config: GateConfig, best: Measurement, candidate: Measurement, without_promotion: int = 0, seed: int = 0
) -> Decision:
    """The decision about a candidate against the best policy so far.

    without_promotion: iterations in a row before this one that were not promoted.
    """
    names = sorted(best.scores.keys() & candidate.scores.keys())
    prompts = best.tokens.keys() | candidate.tokens.keys()
    unscored = len(prompts - set(names))
    if len(names) < config.min_prompts:
        reason = f"{len(names)} of {len(prompts)} held-out prompts were scored on both sides"
        reason += f"; {config.min_prompts} are needed to decide"
        return Decision(KEEP_GOING, reason, None, None, len(names), unscored, None)
    difference = np.array([candidate.scores[name] - best.scores[name] for name in names])
    lengths = np.array([candidate.tokens[name] - best.tokens[name] for name in names])
    plain, controlled = paired_gains(difference, lengths, seed, config.level)
    gain = controlled if config.length_controlled else plain
    outcome, reason = _outcome(config, gain, best, candidate)
    if outcome != PROMOTE and without_promotion + 1 >= config.patience:
        outcome, reason = STOP, f"{reason}; {without_promotion + 1} iterations in a row without a promotion"
    detectable = detectable_gain(gain.stderr * math.sqrt(len(names)), len(names), level=config.level)
    return Decision(outcome, reason, gain, plain, len(names), unscored, detectable)


def _outcome(config: GateConfig, gain: Interval, best: Measurement, candidate: Measurement) -> tuple[Outcome, str]:
    """What this comparison alone says, and why."""
    numbers = f"gain {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    if config.length_controlled:
        numbers += " at equal length"
    drops = []
    if config.max_benchmark_drop is not None:
        drops = regressions(best.benchmarks, candidate.benchmarks, config.max_benchmark_drop)
    if drops:
        return ROLL_BACK, "benchmarks fell too far: " + ", ".join(drops)
    if gain.high < 0:
        return ROLL_BACK, f"worse than the best policy: {numbers}"
    if gain.low > config.min_gain:
        return PROMOTE, f"better than the best policy: {numbers}"
    return KEEP_GOING, f"not clearly better: {numbers}, must lie above {config.min_gain:g}"


def regressions(
    before: Mapping[str, tuple[float, float | None]], after: Mapping[str, tuple[float, float | None]], bound: float
) -> list[str]:
    """The benchmarks that fell by more than the bound and by more than two standard errors of the difference."""
    drops = []
    for name in sorted(before.keys() & after.keys()):
        (old, old_error), (new, new_error) = before[name], after[name]
        noise = 2 * math.hypot(old_error or 0.0, new_error or 0.0)
        if old - new > max(bound, noise):
            drops.append(f"{name} {old:.3f} -> {new:.3f}")
    return drops


def select_checkpoint(
    candidates: Sequence[Measurement], config: GateConfig | None = None, seed: int = 0
) -> tuple[int, list[Interval | None]]:
    """The index of the best of several checkpoints of one training, and the gain of each over the first.

    SPPO's rule: of the checkpoints saved while training, the one with the best held-out score goes on. Gains are
    measured as the gate measures them. Ties go to the earlier one; where too few prompts were scored to compare, the
    last one goes on, as without a choice.
    """
    config = config or GateConfig()
    gains = [decide(config, candidates[0], candidate, seed=seed).gain for candidate in candidates[1:]]
    means = [gain.mean for gain in gains if gain is not None]
    best = len(candidates) - 1
    if len(means) == len(gains):
        best = int(np.argmax([0.0, *means]))
    return best, [None, *gains]
