"""Stages - which rows are trained on when: a plan that depends on the seed and the data alone, not on ranks or memory.

A *step* is one optimizer update over `batch_size` rows; a *micro-batch* is what goes through the model at once. Cutting a step into
micro-batches, and dealing them to ranks, changes neither its rows nor its loss: every micro-batch is divided by the counts of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.models.lazy import torch
from stages.models.policy import Batch, Packed, batches_by_budget, batches_by_sum, collate, pack

STEPS = "steps"
"""Directory of the checkpoints that are kept from the middle of a training, by number of steps."""


class Step(NamedTuple):
    number: int
    """From 0, over all epochs."""
    epoch: int
    rows: list[int]
    """Row numbers."""


def plan_steps(num_rows: int, batch_size: int, epochs: int, seed: int) -> list[Step]:
    """Every step of the training. The last one of an epoch may be smaller; no row is left out or taken twice in an epoch."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            steps.append(Step(len(steps), epoch, order[start : start + batch_size].tolist()))
    return steps


def kept_steps(total: int, parts: Sequence[float]) -> set[int]:
    """After how many steps a checkpoint is kept, beside the last one."""
    return {max(1, round(part * total)) for part in parts} - {total}


def micro_batches(lengths: list[int], budget: int, rank: int, world_size: int, packed: bool = False) -> list[list[int]]:
    """This rank's micro-batches of a step, as positions in `lengths`; an empty one where there are fewer than ranks.

    Every rank gets the same number of them: collective operations inside forward and backward must meet.
    """
    batches = batches_by_sum(lengths, budget) if packed else list(batches_by_budget(lengths, budget))
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def row_length(row: dict[str, Any], sides: tuple[str, ...], packed: bool = False) -> int:
    """Tokens of a row in a batch. Padded: every side as long as the longest one, with the prompt; packed: the prompt once, and no padding."""
    if packed:
        return len(row["prompt_ids"]) + sum(len(row[f"{side}_ids"]) for side in sides)
    return len(sides) * (len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in sides))


def collate_rows(rows: list[dict[str, Any]], sides: tuple[str, ...], packed: bool = False) -> Batch | Packed:
    """B rows as one batch of B responses per side, chosen first."""
    build = pack if packed else collate
    return build(
        [row["prompt_ids"] for row in rows] * len(sides), [row[f"{side}_ids"] for side in sides for row in rows]
    )


def column(rows: list[dict[str, Any]], name: str, length: int) -> Any:
    """A per-token column, right-padded with 0 to [B, length]; None where the rows do not have it."""
    if rows[0][name] is None:
        return None
    padded = np.zeros((len(rows), length), dtype=np.float32)
    for number, row in enumerate(rows):
        padded[number, : len(row[name])] = row[name]
    return torch.from_numpy(padded)
