"""Flows - the figures of report.html, section by section, from a `Story`. A figure without data is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np

from data_contracts.rows import ReportRow
from flows.report import figures
from flows.report.figures import Figure, Series
from flows.report.story import SIDES, Story
from flows.tournament import spread

SHOWN_ITERATIONS = 6
"""Iterations whose weights are shown."""
MOST_BENCHMARKS = 24
MOST_BINS = 24
"""Of a histogram of scores or lengths."""
MOST_STEPS = 400
"""Points of a training curve."""
MOST_MARKS = 8
"""Names of iterations over a training curve."""
MOST_REASONS = 7
"""Reasons for dropping that have a colour of their own; the others are summed."""


def iterations_of(story: Story) -> list[int]:
    """The numbers of the iterations, the start model's 0 first."""
    return [row["iteration"] for row in story.rows]


def progress(story: Story) -> list[Figure]:
    """Held-out score, gain over the start model, win rates between iterations, tournament."""
    iterations = iterations_of(story)
    shown = []
    if any(row["heldout_score"] is not None for row in story.rows):
        score, low, high = ([row.get(name) for row in story.rows] for name in ("heldout_score", "low", "high"))
        curve = Series("held-out score", iterations, score, low, high)
        draw = partial(figures.lines, "held-out score", [curve], "iteration", "score")
        shown.append(Figure("score", "Held-out score, 95 % interval over prompts", draw))
    gains = {iteration: gain for iteration, gain in zip(iterations, story.gains, strict=True) if gain}
    if len(gains) > 1:
        controlled = {iteration: gain["controlled"] for iteration, gain in gains.items()}
        curves = [_gain_curve("as measured", gains), _gain_curve("at equal length", controlled)]
        draw = partial(figures.lines, "gain over the start model", curves, "iteration", "score gain", zero=True)
        labels = [curve.label for curve in curves]
        shown.append(Figure("gain", "Gain over the start model, paired by prompt", draw, labels))
    if len(story.win_rates) > 1:
        names, rates = [str(iteration) for iteration in story.win_rates], list(story.win_rates.values())
        draw = partial(figures.matrix, "win rates between iterations", names, rates, "against iteration", "iteration")
        caption = "How often (%) an iteration beats another on the same prompt; ties count half"
        shown.append(Figure("win-rates", caption, draw))
    if (standing := story.tournament) is not None:
        caption = (
            f"Tournament: how often (%) the row beats the column, by {standing.scorer}, {standing.prompts} prompts"
        )
        if standing.failed:
            caption += f"; {standing.failed} comparisons failed"
        draw = partial(figures.matrix, "tournament", standing.names, standing.rates, "against", "policy")
        shown.append(Figure("tournament", caption, draw))
    return shown


def _gain_curve(label: str, gains: Mapping[int, Mapping[str, float]]) -> Series:
    mean, low, high = ([gain[name] for gain in gains.values()] for name in ("mean", "low", "high"))
    return Series(label, list(gains), mean, low, high)


def given_texts(story: Story) -> list[Figure]:
    """What the policies make of the held-out prompts' own texts: pairs and true responses."""
    shown = []
    for name, caption, axis, metrics in (
        ("preference-accuracy", "Held-out pairs whose chosen text gained more", "part", {"preference_accuracy": ""}),
        ("preference-margin", "Margin of the held-out pairs over the start model", "nats", {"preference_margin": ""}),
        ("preference-loss", "Loss of the held-out pairs (DPO's, beta 0.1)", "loss", {"preference_loss": ""}),
        (
            "given-logps",
            "Log-prob per token of the held-out texts",
            "nats",
            {"response_logp": "true response", "chosen_logp": "chosen", "rejected_logp": "rejected"},
        ),
    ):
        curves = [metric_curve(story, metric, label or axis) for metric, label in metrics.items()]
        curves = [curve for curve in curves if any(value is not None for value in curve.y)]
        if curves:
            draw = partial(figures.lines, caption, curves, "iteration", axis)
            labels = [curve.label for curve in curves] if len(metrics) > 1 else []
            shown.append(Figure(name, caption, draw, labels))
    return shown


def benchmarks(story: Story) -> tuple[list[Figure], int]:
    """A figure for each of the first MOST_BENCHMARKS benchmarks, and how many more there are."""
    iterations = iterations_of(story)
    results: dict[tuple[str, str, str], dict[int, ReportRow]] = {}
    for iteration, report in zip(iterations, story.reports, strict=True):
        for row in report:
            if row["suite"] != "heldout" and row["metric"] != "failed_judgments":
                results.setdefault((row["suite"], row["task"], row["metric"]), {})[iteration] = row
    shown = []
    for (suite, task, metric), values in islice(results.items(), MOST_BENCHMARKS):
        rows = [values.get(iteration, {}) for iteration in iterations]  # a gap where it could not be measured
        value, low, high = ([row.get(name) for row in rows] for name in ("value", "low", "high"))
        last = values[max(values)]
        size = f"{last['n']} questions"
        if last["n_shot"]:
            size += f", {last['n_shot']}-shot"
        caption = f"{suite}: {task}, {metric} ({size})"
        curve = Series(f"{task} {metric}", iterations, value, low, high)
        draw = partial(figures.lines, caption, [curve], "iteration", metric)
        shown.append(Figure(f"benchmark-{len(shown)}", caption, draw))
    return shown, len(results) - len(shown)


def steps_of(story: Story) -> tuple[list[dict[str, float]], list[tuple[float, str]]]:
    """The metrics of all optimizer steps, iteration after iteration, and the step with which each of these begins."""
    lines: list[dict[str, float]] = []
    marks: list[tuple[float, str]] = []
    for iteration, curve in sorted(story.curves.items()):
        marks.append((len(lines) + 1, f"iteration {iteration}"))
        lines += curve
    return lines, marks


def training(story: Story) -> list[Figure]:
    """Metrics of all optimizer steps, iteration after iteration."""
    lines, marks = steps_of(story)
    marks = [marks[i] for i in spread(len(marks), MOST_MARKS)]
    shown = spread(len(lines), MOST_STEPS)
    steps = [i + 1 for i in shown]

    def figure(name: str, caption: str, y_label: str, metrics: dict[str, str], zero: bool = False) -> Iterator[Figure]:
        """The figure of metrics (label -> name), if any step has one of them."""
        curves = [
            Series(label, steps, [lines[i].get(metric) for i in shown], dots=len(shown) < 60)
            for label, metric in metrics.items()
            if any(metric in line for line in lines)
        ]
        if curves:
            x_label = "optimizer step, all iterations"
            draw = partial(figures.lines, caption, curves, x_label, y_label, zero=zero, marks=marks)
            labels = [curve.label for curve in curves] if len(curves) > 1 else []  # the caption names a single curve
            yield Figure(name, caption, draw, labels)

    rewards = {side: f"rewards/{side}" for side in SIDES}
    logps = {side: f"logps/{side}" for side in SIDES}
    accuracy = "Pairs whose chosen response has the higher reward"
    return [
        *figure("rewards", "Implicit rewards while training", "reward", rewards, zero=True),
        *figure("logps", "Log-probability of the responses", "nats", logps),
        *figure("margins", "Reward margin", "chosen minus rejected", {"margin": "rewards/margins"}, zero=True),
        *figure("accuracy", accuracy, "part", {"accuracy": "rewards/accuracies"}),
        *figure("loss", "Loss", "loss", {"loss": "loss"}),
        *figure("grad-norm", "Norm of the gradient, before it is clipped", "norm", {"norm": "grad_norm"}),
        *figure("learning-rate", "Learning rate", "rate", {"rate": "learning_rate"}),
    ]


def weights(story: Story) -> list[Figure]:
    """Histograms of the token weights of at most SHOWN_ITERATIONS iterations."""
    iterations = sorted(story.weights)
    shown = []
    for iteration in [iterations[i] for i in spread(len(iterations), SHOWN_ITERATIONS)]:
        picture = story.weights[iteration]
        caption = f"Iteration {iteration}: weights of {picture.tokens} tokens"
        if picture.clamped:
            caption += "; at a bound: " + ", ".join(f"{name} {part:.1%}" for name, part in picture.clamped.items())
        bins = zip(SIDES, (picture.chosen, picture.rejected), strict=True)
        sides = [(side, values) for side, values in bins if values]
        draw = partial(figures.histograms, caption, picture.edges, sides, "weight", "part of the tokens")
        shown.append(Figure(f"weights-{iteration}", caption, draw, [side for side, _ in sides]))
    return shown


def distributions(story: Story) -> list[Figure]:
    """Scores and lengths of the held-out answers, of the start model and of the last policy."""
    if len(story.heldout) < 2:
        return []
    names = ["start model", f"iteration {iterations_of(story)[-1]}"]
    ends = (story.heldout[0], story.heldout[-1])
    scores = [[row["score"] for row in rows if row["score"] is not None] for rows in ends]
    tokens = [[float(row["num_tokens"]) for row in rows] for rows in ends]
    shown = []
    for name, caption, x_label, columns in (
        ("scores", "Scores of the held-out answers, before and after", "score", scores),
        ("token-counts", "Lengths of the held-out answers, before and after", "tokens", tokens),
    ):
        if not all(columns):
            continue
        low, high = min(map(min, columns)), max(map(max, columns))
        edges = np.linspace(low, high, MOST_BINS + 1) if high > low else np.linspace(low - 0.5, high + 0.5, 4)
        bars = [
            (label, list(np.histogram(values, edges)[0] / len(values)))
            for label, values in zip(names, columns, strict=True)
        ]
        draw = partial(figures.histograms, caption, list(map(float, edges)), bars, x_label, "part of the answers")
        shown.append(Figure(name, caption, draw, names))
    return shown


def lengths(story: Story) -> list[Figure]:
    """Lengths of the held-out answers, their fluency, and how many are finished, distinct and repetitive."""
    tokens = [metric_curve(story, "mean_tokens", "mean")]
    for fraction, label in ((0.5, "median"), (0.9, "longest tenth")):
        values = [_quantile([row["num_tokens"] for row in rows], fraction) for rows in story.heldout]
        tokens.append(Series(label, iterations_of(story), values))
    fluency = [metric_curve(story, "start_logp", "log-prob")]
    rates = [
        metric_curve(story, "finished_rate", "ended by itself"),
        metric_curve(story, "distinct_rate", "distinct answers"),
        metric_curve(story, "repetition", "repetition"),
    ]
    rates = [curve for curve in rates if any(value is not None for value in curve.y)]
    token_draw = partial(figures.lines, "tokens per answer", tokens, "iteration", "tokens")
    fluency_draw = partial(figures.lines, "fluency", fluency, "iteration", "nats")
    rate_draw = partial(figures.lines, "rates", rates, "iteration", "part")
    return [
        Figure("lengths", "Tokens per held-out answer", token_draw, [curve.label for curve in tokens]),
        Figure("fluency", "Mean log-prob per token under the start model", fluency_draw),
        Figure("rates", "Held-out answers", rate_draw, [curve.label for curve in rates]),
    ]


def _quantile(values: Sequence[float], fraction: float) -> float | None:
    if not values:
        return None
    return float(sorted(values)[min(int(fraction * len(values)), len(values) - 1)])


def metric_curve(story: Story, metric: str, label: str) -> Series:
    """A held-out metric over the iterations, with its interval where it has one."""
    rows = []
    for report in story.reports:
        by_metric = {row["metric"]: row for row in report if row["suite"] == "heldout"}
        rows.append(by_metric.get(metric, {}))
    value, low, high = ([row.get(name) for row in rows] for name in ("value", "low", "high"))
    if all(end is None for end in low):
        return Series(label, iterations_of(story), value)
    return Series(label, iterations_of(story), value, low, high)


def dropped(story: Story) -> list[Figure]:
    """What did not train, by reason."""
    counts = {iteration: part.dropped for iteration, part in sorted(story.trained.items())}
    totals: Counter[str] = Counter()
    for reasons in counts.values():
        totals.update(reasons)
    if not totals:
        return []
    order = sorted(totals, key=lambda reason: -totals[reason])
    common, rare = order[:MOST_REASONS], order[MOST_REASONS:]
    parts = [(reason, [reasons.get(reason, 0.0) for reasons in counts.values()]) for reason in common]
    if rare:
        parts.append(("other", [sum(reasons.get(name, 0.0) for name in rare) for reasons in counts.values()]))
    draw = partial(figures.stacks, "what was dropped", list(map(str, counts)), parts, "iteration", "count")
    labels = [f"{label} ({sum(values):g})" for label, values in parts]
    return [Figure("dropped", "Prompts, pairs and candidates that did not train, by reason", draw, labels)]


def times(story: Story) -> list[Figure]:
    """Seconds of each stage."""
    stages = list(dict.fromkeys(stage for seconds in story.seconds for stage in seconds))
    parts = [(stage, [seconds.get(stage, 0.0) for seconds in story.seconds]) for stage in stages]
    bars = [str(iteration) for iteration in iterations_of(story)]
    draw = partial(figures.stacks, "seconds of each stage", bars, parts, "iteration", "seconds")
    return [Figure("seconds", "Wall seconds of each stage, all tries together", draw, stages)]
