"""Stages - rows of eval_report, and the name of each row's number in a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from data_contracts.rows import ReportRow
from stages.evaluation.intervals import Interval


def report_row(
    suite: str,
    task: str,
    metric: str,
    value: float,
    n: int,
    stderr: float | None = None,
    low: float | None = None,
    high: float | None = None,
    version: str = "1",
    n_shot: int = 0,
) -> ReportRow:
    """A row of eval_report. n: prompts or questions behind the number; version: of the task, or the judge's name."""
    return ReportRow(
        suite=suite,
        task=task,
        metric=metric,
        value=float(value),
        stderr=_known(stderr),
        low=_known(low),
        high=_known(high),
        n=int(n),
        n_shot=n_shot,
        task_version=version,
    )


def _known(value: float | None) -> float | None:
    """None for NaN: a report has no number that is not known."""
    if value is None or math.isnan(value):
        return None
    return value


def interval_row(suite: str, task: str, metric: str, interval: Interval, n: int, version: str = "1") -> ReportRow:
    """A row of eval_report for a mean with its interval."""
    return report_row(suite, task, metric, interval.mean, n, interval.stderr, interval.low, interval.high, version)


def column_names(rows: Sequence[ReportRow]) -> list[str]:
    """The name of each row's number in a table, all different.

    `task/metric`; `suite/task/metric` where several suites have the task; numbered where even that is not enough.
    """
    short_names = [f"{row['task']}/{row['metric']}" for row in rows]
    counts = Counter(short_names)
    names = []
    used: Counter[str] = Counter()
    for row, name in zip(rows, short_names, strict=True):
        if counts[name] > 1:
            name = f"{row['suite']}/{name}"
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name} ({used[name]})")
    return names
