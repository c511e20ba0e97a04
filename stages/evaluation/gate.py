r"""Stages - is this policy better than that one? A paired, length-controlled decision over held-out prompts. Pure numpy.

Model of the differences, one per held-out prompt i (axis N), with d_i = score_after - score_before and l_i = tokens_after - tokens_before:

    d_i = gain + slope * tanh(l_i / sd(l)) + noise_i

`gain` is the difference at equal length, as AlpacaEval 2 controls for length inside its logistic model. Its interval comes from resampling
prompts, pairs kept. Prompts that either side could not score are counted and left out.

How many prompts: the smallest true gain that is seen in a part `power` of all runs is (1.96 + z_power) * sd(d) / sqrt(N). `prompts_needed`
plans with a power of 85 %: for five points 8.98 * (sd / 0.05)^2 prompts, e.g. 324 at sd 0.3 (the quickstart's) and 898 at sd 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from data_contracts.config import Runtime
from stages.evaluation.intervals import Interval
from stages.evaluation.rows import column_names

PROMOTE, KEEP_GOING, ROLL_BACK, STOP = "promote", "keep going", "roll back", "stop"
Outcome = Literal["promote", "keep going", "roll back", "stop"]
DRAWS = 2000


class GateConfig(Runtime):
    """What happens with a candidate that did not beat the best policy so far. It changes no artifact, only which policy goes on."""

    enabled: bool = False
    """Act on the decision. Off: it is taken and recorded all the same."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Of the interval of the gain."""
    length_controlled: bool = True
    """Compare at equal length; off: the plain mean difference."""
    min_gain: float = Field(0.0, ge=0)
    """The whole interval must lie above this."""
    max_benchmark_drop: float | None = Field(None, ge=0)
    """Roll back if a benchmark is worse than the best policy's by more than this and by more than two standard errors."""
    patience: int = Field(2, ge=1)
    """Stop after so many iterations in a row without a promotion."""
    min_prompts: int = Field(20, ge=2)
    """Fewer scored pairs than this decide nothing."""


class Decision(NamedTuple):
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


def paired_gain(
    difference: np.ndarray, lengths: np.ndarray | None = None, seed: int = 0, level: float = 0.95, draws: int = DRAWS
) -> Interval:
    """Interval of the mean difference, at equal length if the length differences are given. Both [N].

    A resample in which all lengths are alike has no slope: its gain is the plain mean.
    """
    plain, controlled = paired_gains(
        difference, np.zeros(len(difference)) if lengths is None else lengths, seed, level, draws
    )
    return plain if lengths is None else controlled


def paired_gains(
    difference: np.ndarray, lengths: np.ndarray, seed: int = 0, level: float = 0.95, draws: int = DRAWS
) -> tuple[Interval, Interval]:
    """The mean difference and the gain at equal length, over the same resamples."""
    y, x = np.asarray(difference, dtype=np.float64), length_term(np.asarray(lengths, dtype=np.float64))
    picks = np.random.default_rng(seed).integers(0, len(y), size=(draws, len(y)))
    drawn = y[picks]
    plain = drawn.mean(axis=1)
    controlled = _intercept(x[picks], drawn) if x.any() else plain
    at_equal_length = float(_intercept(x[None], y[None])[0])
    return _interval(float(y.mean()), plain, level), _interval(at_equal_length, controlled, level)


def _interval(mean: float, draws: np.ndarray, level: float) -> Interval:
    tail = (1 - level) / 2
    return Interval(
        mean, float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail)), float(draws.std(ddof=1))
    )


def length_term(lengths: np.ndarray) -> np.ndarray:
    """tanh(l / sd(l)): long tails count no more than two standard deviations do; 0 where both are as long."""
    spread = float(lengths.std())
    return np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)


def _intercept(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares y = a + b x along the last axis; a."""
    x_mean, y_mean = x.mean(axis=-1), y.mean(axis=-1)
    variance = (x * x).mean(axis=-1) - x_mean**2
    covariance = (x * y).mean(axis=-1) - x_mean * y_mean
    slope = np.divide(covariance, variance, out=np.zeros_like(covariance), where=variance > 1e-12)
    return y_mean - slope * x_mean


def prompts_needed(spread: float, gain: float = 0.05, power: float = 0.85, level: float = 0.95) -> int:
    """Held-out prompts with which a true gain is seen in a part `power` of all runs; `spread`: standard deviation of the differences."""
    return math.ceil((_z(level, power) * spread / gain) ** 2)


def detectable_gain(spread: float, prompts: int, power: float = 0.8, level: float = 0.95) -> float:
    return _z(level, power) * spread / math.sqrt(prompts)


def _z(level: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)


class Measured(NamedTuple):
    """What the gate knows of a policy."""

    scores: Mapping[str, float]
    """Mean score of each held-out prompt that could be scored."""
    tokens: Mapping[str, float]
    """Mean length of the answers to each held-out prompt."""
    benchmarks: Mapping[str, tuple[float, float | None]] = {}
    """Name -> (value, standard error); larger is better."""


def compare(
    config: GateConfig, best: Measured, candidate: Measured, without_promotion: int = 0, seed: int = 0
) -> Decision:
    """The decision about a candidate against the best policy so far; `without_promotion`: iterations in a row before this one."""
    names = sorted(best.scores.keys() & candidate.scores.keys())
    asked = best.tokens.keys() | candidate.tokens.keys()
    unscored = len(asked - set(names))
    last_try = without_promotion + 1 >= config.patience
    if len(names) < config.min_prompts:
        reason = f"{len(names)} of {len(asked)} held-out prompts were scored on both sides; {config.min_prompts} are needed to decide"
        return Decision(KEEP_GOING, reason, None, None, len(names), unscored, None)
    difference = np.array([candidate.scores[name] - best.scores[name] for name in names])
    lengths = np.array([candidate.tokens[name] - best.tokens[name] for name in names])
    plain, controlled = paired_gains(difference, lengths, seed, config.level)
    gain = controlled if config.length_controlled else plain
    detectable = detectable_gain(gain.stderr * math.sqrt(len(names)), len(names), level=config.level)
    facts = (gain, plain, len(names), unscored, detectable)
    interval = f"[{gain.low:+.3f}, {gain.high:+.3f}]" + (" at equal length" if config.length_controlled else "")
    worse = (
        []
        if config.max_benchmark_drop is None
        else regressions(best.benchmarks, candidate.benchmarks, config.max_benchmark_drop)
    )
    if worse:
        outcome, reason = ROLL_BACK, "benchmarks fell too far: " + ", ".join(worse)
    elif gain.high < 0:
        outcome, reason = ROLL_BACK, f"worse than the best policy: gain {gain.mean:+.3f} {interval}"
    elif gain.low > config.min_gain:
        return Decision(PROMOTE, f"better than the best policy: gain {gain.mean:+.3f} {interval}", *facts)
    else:
        outcome, reason = (
            KEEP_GOING,
            f"not clearly better: gain {gain.mean:+.3f} {interval}, must lie above {config.min_gain:g}",
        )
    if last_try:
        return Decision(STOP, f"{reason}; {without_promotion + 1} iterations in a row without a promotion", *facts)
    return Decision(outcome, reason, *facts)


def regressions(
    before: Mapping[str, tuple[float, float | None]], after: Mapping[str, tuple[float, float | None]], bound: float
) -> list[str]:
    """Benchmarks that fell by more than the bound and by more than two standard errors of the difference."""
    found = []
    for name in sorted(before.keys() & after.keys()):
        (old, old_error), (new, new_error) = before[name], after[name]
        noise = 2 * math.hypot(old_error or 0.0, new_error or 0.0)
        if old - new > max(bound, noise):
            found.append(f"{name} {old:.3f} -> {new:.3f}")
    return found


def select(
    candidates: Sequence[Measured], config: GateConfig | None = None, seed: int = 0
) -> tuple[int, list[Interval | None]]:
    """Index of the best of several checkpoints of one training, and the gain of each over the first, by the gate's own measure.

    SPPO's rule: of the checkpoints saved while training, the one with the best held-out score goes on. Ties go to the earlier one; where
    too few prompts were scored to compare, to the last one, as without a choice.
    """
    config = config or GateConfig()
    gains = [None, *(compare(config, candidates[0], one, seed=seed).gain for one in candidates[1:])]
    if None in gains[1:]:
        return len(candidates) - 1, gains
    return int(np.argmax([0.0, *(gain.mean for gain in gains[1:])])), gains


def measured(heldout: Sequence[Mapping[str, Any]], report: Sequence[Mapping[str, Any]]) -> Measured:
    """From the rows of `heldout` and `eval_report`. Benchmarks: what has a standard error and is no held-out number."""
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
    return Measured(_means(scores), _means(tokens), benchmarks)


def _means(groups: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in groups.items()}
