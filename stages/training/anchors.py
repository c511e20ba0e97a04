"""Stages - answers sampled from the policy while it trains (TI-DPO's anchors), many at once, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from stages.methods.base import AnchorSampling
from stages.models.lazy import torch
from stages.models.policy import batches_by_budget

if TYPE_CHECKING:
    from torch import Generator, Tensor

Answers = dict[str, list[int]]
"""Token ids by pair_id."""


class RowDraws:
    """A logits processor that draws each row's token itself, by a generator of the row's own, and leaves no other.

    The row's numbers are those of sampling it alone: what else is in the batch does not move its draws.
    """

    def __init__(self, sampling: AnchorSampling, generators: Sequence[Generator]):
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.generators = generators
        self.warpers: list[Callable[[Any, Any], Tensor]] = []
        if sampling.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[N, L], logits [N, V] -> [N, V], 0 for the token drawn and -inf for all others."""
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        shares = scores.softmax(-1)
        draws = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(shares, self.generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.stack(draws), 0.0)


def sample_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: AnchorSampling,
    stop_ids: Sequence[int],
    budget: int,
) -> list[list[int]]:
    """Return an answer to each prompt, as sampled alone under its seed; a batch has at most `budget` padded tokens.

    model: a transformers model in eval mode, whole on this rank. An answer ends with the stop id that ended it.
    """
    device = next(model.parameters()).device
    answers: list[list[int]] = [[]] * len(prompts)
    for numbers in batches_by_budget([len(prompt) + sampling.max_new_tokens for prompt in prompts], budget):
        width = max(len(prompts[number]) for number in numbers)
        ids = torch.zeros((len(numbers), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(numbers):
            ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, width - len(prompts[number]) :] = 1
        generators = [torch.Generator(device).manual_seed(seeds[number]) for number in numbers]
        output = cast(Any, model).generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,  # RowDraws leaves one token to choose
            logits_processor=[RowDraws(sampling, generators)],
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
            use_cache=True,
        )
        for number, row in zip(numbers, output[:, width:].tolist(), strict=True):
            answers[number] = _until_stop(row, stop_ids)
    return answers


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids up to the first stop id, with it: what follows is padding of rows that ended before others."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def gathered(answers: Answers, world_size: int) -> Answers:
    """The answers of all ranks; every rank must call this."""
    if world_size == 1:
        return answers
    parts: list[Answers | None] = [None] * world_size
    torch.distributed.all_gather_object(parts, answers)
    return {pair_id: ids for part in parts if part is not None for pair_id, ids in part.items()}
