"""Stages - rows of eval_report, and what each of them is called in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def report_row(
    suite: str, task: str, metric: str, value: float, n: int, stderr: float | None = None, low: float | None = None,
    high: float | None = None, version: str = "1",
) -> dict[str, Any]:  # fmt: skip
    """A row of eval_report."""
    numbers = {"value": float(value), "stderr": stderr, "low": low, "high": high, "n": int(n), "n_shot": 0}
    return {"suite": suite, "task": task, "metric": metric, **numbers, "task_version": version}


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`task/metric` of each row; `suite/task/metric` where several suites have the task; numbered where even that is not enough."""
    short = [f"{row['task']}/{row['metric']}" for row in rows]
    often = Counter(short)
    names = [name if often[name] == 1 else f"{row['suite']}/{name}" for name, row in zip(short, rows, strict=True)]
    seen: Counter[str] = Counter()
    for number, name in enumerate(names):
        seen[name] += 1
        names[number] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names
