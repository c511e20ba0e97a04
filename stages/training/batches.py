"""Stages - which rows are trained on when: a plan that depends on the seed and the data alone, not on ranks or memory.

An optimizer step is one update over `batch_size` rows; a micro-batch is what goes through the model at once. Cutting a
step into micro-batches, and dealing them to ranks, changes neither its rows nor its loss: every micro-batch is divided
by the counts of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.models.lazy import torch
from stages.models.policy import Batch, Packed, batches_by_budget, batches_by_sum, collate, pack

if TYPE_CHECKING:
    from torch import Tensor

STEPS = "steps"
"""Directory of the checkpoints kept from the middle of a training; each is named by its number of steps."""

WeightedPair = dict[str, Any]
"""A row of weighted_pairs, by column (data_contracts/shards.py)."""


class OptimizerStep(NamedTuple):
    """One update of the policy."""

    number: int
    """From 0, over all epochs."""
    epoch: int
    rows: list[int]
    """Row numbers."""


def plan_steps(num_rows: int, batch_size: int, epochs: int, seed: int) -> list[OptimizerStep]:
    """Return every step of the training. An epoch takes each row once; its last step may be smaller."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            steps.append(OptimizerStep(len(steps), epoch, order[start : start + batch_size].tolist()))
    return steps


def kept_steps(total: int, parts: Sequence[float]) -> set[int]:
    """Return the numbers of steps after which a checkpoint is kept, beside the last one."""
    return {max(1, round(part * total)) for part in parts} - {total}


def micro_batches(lengths: list[int], budget: int, rank: int, world_size: int, packed: bool = False) -> list[list[int]]:
    """Return this rank's micro-batches of a step, as positions in `lengths`; [] where ranks outnumber batches.

    Every rank gets the same number of them: collective operations inside forward and backward must meet.
    """
    batches = batches_by_sum(lengths, budget) if packed else list(batches_by_budget(lengths, budget))
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def row_length(row: WeightedPair, sides: tuple[str, ...], packed: bool = False) -> int:
    """Return the tokens of a row in a batch.

    Packed: the prompt once, and its responses. Padded: the prompt with each response, all as long as the longest.
    """
    if packed:
        return len(row["prompt_ids"]) + sum(len(row[f"{side}_ids"]) for side in sides)
    return len(sides) * (len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in sides))


def collate_rows(rows: Sequence[WeightedPair], sides: tuple[str, ...], packed: bool = False) -> Batch | Packed:
    """Return B rows as one batch of B responses per side, the chosen responses first."""
    build = pack if packed else collate
    prompts = [row["prompt_ids"] for row in rows] * len(sides)
    return build(prompts, [row[f"{side}_ids"] for side in sides for row in rows])


def column(rows: Sequence[WeightedPair], name: str, length: int) -> Tensor | None:
    """Return a per-token column, right-padded with 0 to [B, length]; None where the rows do not have it."""
    if rows[0][name] is None:
        return None
    padded = np.zeros((len(rows), length), dtype=np.float32)
    for number, row in enumerate(rows):
        padded[number, : len(row[name])] = row[name]
    return torch.from_numpy(padded)
