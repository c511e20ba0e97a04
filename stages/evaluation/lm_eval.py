"""Stages - local lm-eval tasks with the Hugging Face backend; the one file that imports lm_eval.

A task is a directory: `task.yaml` in lm-eval's own format and the data files that it names, relative to it. No hub is asked, and no request
cache is used: lm-eval keys its caches by the request's text alone and would answer for another checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from data_contracts.errors import ConfigError


def load_task(directory: str) -> dict[str, Any]:
    """The task with absolute data paths: lm-eval resolves relative ones against the working directory. Raises: ConfigError."""
    path = Path(directory) / "task.yaml"
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
    except OSError as error:
        raise ConfigError(f"cannot read the lm-eval task {path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not an lm-eval task with dataset_kwargs.data_files: {error!r}") from None
    for split, name in files.items():
        data = path.parent / name
        if not data.is_file():
            raise ConfigError(f"{path} names the {split} file {name}, which does not exist beside it")
        files[split] = str(data.absolute())
    return task


def evaluate(model: Any, tokenizer: Any, tasks: list[dict[str, Any]], batch_size: int, limit: int | None) -> list[dict[str, Any]]:
    """Rows of eval_report for every task and metric."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=2048)
    result = lm_eval.simple_evaluate(
        model=wrapped, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, limit=limit, log_samples=False
    )
    rows = []
    for name, metrics in result["results"].items():
        count = int(result["n-samples"][name]["effective"])
        for key, value in metrics.items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr"):  # without a filter's name it is no metric: alias, sample_len
                continue
            # Mean of 0/1 values: its standard error without a bootstrap (lm-eval then says "N/A").
            error = (value * (1 - value) / max(count - 1, 1)) ** 0.5 if 0 <= value <= 1 else None
            rows.append(
                {
                    "suite": "lm-eval",
                    "task": name,
                    "metric": metric,
                    "value": float(value),
                    "stderr": error,
                    "low": None if error is None else value - 1.96 * error,
                    "high": None if error is None else value + 1.96 * error,
                    "n": count,
                    "n_shot": int(result["n-shot"].get(name) or 0),
                    "task_version": str(result["versions"].get(name, "")),
                }
            )
    return rows
