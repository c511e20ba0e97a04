"""Stages - how likely the policy makes the given texts of held-out prompts: the true response, and both sides of a pair.

Offline methods train on such texts, so these numbers say what was learnt where the scores of sampled answers need not.

    margin_i = log p(chosen|x) - log p(rejected|x) under the policy, minus the same under the start model     [nats]
    accuracy = mean of [margin_i > 0], a margin of 0 counted 1/2
    loss     = mean of -log sigmoid(BETA margin_i)

(Rafailov et al. 2023, eq. 7, with the start model as the reference; before the first update margin 0, accuracy 1/2, loss
log 2.) Log-probs of a text are means over its tokens, then over prompts. A text is tokenised as training would, after
the prompt as the sampler wrote it. The start model's pass is paid once for all iterations (stages/models/logps.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow, ReportRow
from stages.evaluation.intervals import bootstrap
from stages.evaluation.rows import interval_row
from stages.job import Job
from stages.models.logps import Pass
from stages.models.turns import GIVEN_TEXTS, Turns

if TYPE_CHECKING:
    from stages.evaluation.stage import EvaluationConfig

BETA = 0.1
"""Of the loss: DPO's, whatever the run trains with, so that runs can be compared."""
MOST_PROMPTS = 1000
"""Prompts with given texts that are measured: the first ones. What they cost stays a small part of their sampling."""
MOST_TOKENS = 1024
"""A longer text is cut."""
VERSION = 1
"""Raise it when the numbers change their meaning: it enters the keys of evaluations that hold them."""


class Given(NamedTuple):
    """The texts of one prompt as tokens."""

    prompt_id: str
    prompt_ids: list[int]
    texts: dict[str, list[int]]
    """By the name of their field."""


def has_given_texts(directory: str | Path) -> bool:
    """Whether a prompts artifact holds responses or pairs, by its files' statistics; False where it is not there."""
    counts = dict.fromkeys(GIVEN_TEXTS, 0)
    for path in Path(directory).glob("part-*.parquet"):
        metadata = pq.read_metadata(path)
        names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for name in GIVEN_TEXTS:
                statistics = group.column(names.index(name)).statistics
                num_nulls = statistics.null_count if statistics is not None else None
                counts[name] += group.num_rows - (num_nulls or 0)
    return counts["response"] > 0 or min(counts["chosen"], counts["rejected"]) > 0


def given_rows(job: Job, batches: Iterable[tuple[list[PromptRow], list[list[GenerationRow]]]]) -> list[ReportRow]:
    """Rows of eval_report about the prompts' given texts. `batches`: prompts with the answers to each."""
    given = _read(job, batches)
    pairs = [row for row in given if {"chosen", "rejected"} <= row.texts.keys()]
    truths = [row for row in given if "response" in row.texts]
    wanted = {"chosen": pairs, "rejected": pairs, "response": truths}
    policy = _logps(job, "policy", wanted)
    start = _logps(job, "start", {"chosen": pairs, "rejected": pairs})
    values: dict[str, np.ndarray] = {}
    if pairs:
        margins = _sums(policy["chosen"]) - _sums(policy["rejected"])
        margins -= _sums(start["chosen"]) - _sums(start["rejected"])
        margins = margins[np.isfinite(margins)]
        values["preference_accuracy"] = np.sign(margins) / 2 + 0.5
        values["preference_margin"] = margins
        values["preference_loss"] = np.logaddexp(0.0, -BETA * margins)
    for name, logps in policy.items():
        means = np.array([row.mean(dtype=np.float64) for row in logps])
        values[f"{name}_logp"] = means[np.isfinite(means)]
    return [
        interval_row("heldout", "heldout", metric, bootstrap(numbers), len(numbers))
        for metric, numbers in values.items()
        if len(numbers)
    ]


def _read(job: Job, batches: Iterable[tuple[list[PromptRow], list[list[GenerationRow]]]]) -> list[Given]:
    """The given texts of at most MOST_PROMPTS prompts as tokens, by prompt id."""
    config: EvaluationConfig = job.config
    turns = Turns(job.path("policy"), config)
    given: list[Given] = []
    for prompts, groups in batches:
        for prompt, answers in zip(prompts, groups, strict=True):
            texts = {name: text for name in GIVEN_TEXTS if (text := prompt[name])}
            if ("chosen" in texts) != ("rejected" in texts):  # a single labelled answer is no pair
                texts = {name: text for name, text in texts.items() if name == "response"}
            if texts:
                ids = {name: turns.response(text)[:MOST_TOKENS] for name, text in texts.items()}
                given.append(Given(prompt["prompt_id"], answers[0]["prompt_ids"], ids))
        if len(given) >= MOST_PROMPTS:
            break
    return sorted(given[:MOST_PROMPTS])


def _logps(job: Job, role: str, wanted: dict[str, list[Given]]) -> dict[str, list[np.ndarray]]:
    """Log-probs per token of the texts of each field, under one of the stage's models."""
    wanted = {name: rows for name, rows in wanted.items() if rows}
    if not wanted:
        return {}
    config: EvaluationConfig = job.config
    model = Pass(job.store_root, job.inputs[role], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    prompts = [row.prompt_ids for rows in wanted.values() for row in rows]
    model.fill(prompts, [row.texts[name] for name, rows in wanted.items() for row in rows])
    logps = {
        name: model.get([row.prompt_ids for row in rows], [row.texts[name] for row in rows])
        for name, rows in wanted.items()
    }
    model.account(job)
    model.release()
    return logps


def _sums(logps: list[np.ndarray]) -> np.ndarray:
    """The log-prob of each text in nats; NaN where a part of it lies beyond the model's context."""
    return np.array([row.sum(dtype=np.float64) for row in logps])
