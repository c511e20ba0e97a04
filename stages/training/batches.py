"""Stages - which pairs are trained on when: a plan that depends on the seed and the data alone, not on ranks or memory.

A *step* is one optimizer update over `batch_size` pairs; a *micro-batch* is what goes through the model at once. Cutting a step into
micro-batches, and dealing them to ranks, changes neither its pairs nor its loss: every micro-batch is divided by the count of the step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stages.lazy import torch
from stages.methods.base import Pairs, Responses
from stages.policy import Batch, batches_by_budget, collate

SIDES = ("chosen", "rejected")


class Step(NamedTuple):
    number: int
    """From 0, over all epochs."""
    epoch: int
    pairs: list[int]
    """Row numbers of the pairs."""


def plan_steps(num_pairs: int, batch_size: int, epochs: int, seed: int) -> list[Step]:
    """Every step of the training. The last one of an epoch may be smaller; no pair is left out or taken twice in an epoch."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
        for start in range(0, num_pairs, batch_size):
            steps.append(Step(len(steps), epoch, order[start : start + batch_size].tolist()))
    return steps


def micro_batches(lengths: list[int], budget: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's micro-batches of a step, as positions in `lengths`; an empty one where there are fewer than ranks.

    Every rank gets the same number of them: collective operations inside forward and backward must meet.
    """
    batches = list(batches_by_budget(lengths, budget))
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def pair_length(row: dict[str, Any]) -> int:
    """Tokens of a pair in a padded batch: both sides as long as the longer one."""
    return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))


def collate_pairs(rows: list[dict[str, Any]]) -> tuple[Batch, dict[str, Any]]:
    """B pairs as one batch of 2B responses, chosen first, and the constants that go with them ([B, T] and [B])."""
    batch = collate([row["prompt_ids"] for row in rows] * 2, [row[f"{side}_ids"] for side in SIDES for row in rows])
    length = batch.response_ids.shape[1]
    constants: dict[str, Any] = {
        f"{side}_{name}": torch.from_numpy(np.stack([np.pad(np.asarray(row[f"{side}_{name}"], dtype=np.float32), (0, length - len(row[f"{side}_ids"]))) for row in rows]))
        for side in SIDES
        for name in ("reference_logps", "weights")
    }
    for name in ("win_rate_chosen", "win_rate_rejected"):
        constants[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
    return batch, constants


def as_pairs(logps: Any, batch: Batch, constants: dict[str, Any]) -> Pairs:
    """What a method sees: the policy's log-probs beside the constants."""
    half = len(logps) // 2
    sides = []
    for side, rows in zip(SIDES, (slice(0, half), slice(half, None)), strict=True):
        reference, weights = (constants[f"{side}_{name}"].to(logps) for name in ("reference_logps", "weights"))
        sides.append(Responses(logps[rows], reference, weights, batch.response_mask[rows]))
    return Pairs(*sides, *(constants[name].to(logps) for name in ("win_rate_chosen", "win_rate_rejected")))
