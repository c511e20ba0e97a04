"""Stages - which rows are trained on when: a plan that depends on the seed and the data alone, not on ranks or memory.

An optimizer step is one update over `batch_size` rows; a micro-batch is what goes through the model at once. Cutting a
step into micro-batches, and dealing them to ranks, changes neither its rows nor its loss: every micro-batch is divided
by the counts of the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.models.lazy import torch
from stages.models.packing import Packed, pack
from stages.models.policy import Batch, batches_by_budget, batches_by_sum, collate

if TYPE_CHECKING:
    from torch import Tensor

MARGIN_AT_STEP_1 = "margin_at_step_1"
"""Metric of a checkpoint: |margin| of the first step's rows, before any update."""
METRICS = "metrics.jsonl"
"""A line per step."""
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
    """Return this rank's micro-batches of a step, as positions in `lengths`; [] where ranks outnumber rows.

    Every rank gets the same number of them: collective operations inside forward and backward must meet. Ranks wait for
    the slowest, so for several ranks the batches are as equal as the rows allow.
    """
    if world_size == 1:
        if packed:
            return batches_by_sum(lengths, budget)
        return list(batches_by_budget(lengths, budget))
    deal = deal_packed if packed else deal_padded
    batches = deal(lengths, budget, world_size)
    # Ranks meet at every micro-batch: those of about one size stand side by side.
    batches.sort(key=lambda batch: -_computed([lengths[i] for i in batch], packed))
    batches += [[]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def _computed(lengths: Sequence[int], packed: bool) -> int:
    """The tokens that a batch of rows of these lengths computes."""
    return sum(lengths) if packed else len(lengths) * max(lengths)


def deal_packed(lengths: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """Return indices in batches of about equal sums, a multiple of `ranks` of them (or one per row), in the budget.

    The longest row first, each to the batch with the smallest sum: at most 4/3 of the best possible (Graham 1969).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = ranks * max(1, -(-sum(lengths) // (budget * ranks)))
    while True:
        count = min(count, len(lengths))
        batches: list[list[int]] = [[] for _ in range(count)]
        sums = [(0, number) for number in range(count)]
        for index in order:
            size, number = heapq.heappop(sums)
            batches[number].append(index)
            heapq.heappush(sums, (size + lengths[index], number))
        if count == len(lengths) or all(size <= budget or len(batches[number]) == 1 for size, number in sums):
            return batches
        count += ranks


def deal_padded(lengths: Sequence[int], budget: int, ranks: int) -> list[list[int]]:
    """Return indices in batches of about equal padded size, a multiple of `ranks` of them (or one per row).

    Rows of similar length lie side by side; the smallest budget that needs no more batches makes them equal.
    """
    fewest = len(list(batches_by_budget(lengths, budget)))
    target = min(len(lengths), -(-fewest // ranks) * ranks)
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        if len(list(batches_by_budget(lengths, middle))) <= target:
            high = middle
        else:
            low = middle + 1
    batches = list(batches_by_budget(lengths, low))
    while len(batches) < target:  # rows of one length fall into fewer batches: cut the largest
        largest = max(
            range(len(batches)),
            key=lambda number: (len(batches[number]) > 1) * len(batches[number]) * lengths[batches[number][0]],
        )
        rows = batches[largest]
        batches[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return batches


def row_length(row: WeightedPair, sides: tuple[str, ...], packed: bool = False) -> int:
    """Return the tokens of a row in a batch.

    Packed: the prompt once, and its responses. Padded: the prompt with each response, all as long as the longest.
    """
    if packed:
        return len(row["prompt_ids"]) + sum(len(row[f"{side}_ids"]) for side in sides)
    return len(sides) * (len(row["prompt_ids"]) + max(len(row[f"{side}_ids"]) for side in sides))


def collate_rows(
    rows: Sequence[WeightedPair], sides: tuple[str, ...], packed: bool = False, varlen: bool = False
) -> Batch | Packed:
    """Return B rows as one batch of B responses per side, the chosen responses first."""
    prompts = [row["prompt_ids"] for row in rows] * len(sides)
    responses = [row[f"{side}_ids"] for side in sides for row in rows]
    if packed:
        return pack(prompts, responses, varlen)
    return collate(prompts, responses)


def column(rows: Sequence[WeightedPair], name: str, length: int) -> Tensor | None:
    """Return a per-token column, right-padded with 0 to [B, length]; None where the rows do not have it."""
    if rows[0][name] is None:
        return None
    padded = np.zeros((len(rows), length), dtype=np.float32)
    for number, row in enumerate(rows):
        padded[number, : len(row[name])] = row[name]
    return torch.from_numpy(padded)
