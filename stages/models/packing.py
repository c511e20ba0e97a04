"""Stages - packed batches: responses without padding, every prompt once, as one row of tokens.

Axes: S packed tokens, N responses, T tokens of the longest response, n scored tokens; G groups (a prompt and its
responses), L cells of the longest group. Two layouts tell attention what a token sees: `Grouped` for every device,
`Varlen` for flash attention on GPUs (stages/models/kernels.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stages.models.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

GROUP_TOKENS = 512
"""Most tokens of a group with more than two responses: attention's cost grows with the square of a group's length."""

PACKABLE = frozenset({"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "olmo2", "phi3", "smollm3"})
"""Model types (config.json) for which a test holds packed numbers equal to padded ones; all other types are padded."""


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return the tensor on a device; on a GPU from pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Grouped(NamedTuple):
    """One padded row per group: the token in each cell, and which cells a cell sees."""

    mask: Tensor  # [G, 1, L, L] bool: which cell of a group sees which
    cells: Tensor  # [G * L] the token in each cell of the groups, -1 for none
    tokens: Tensor  # [S] the cell of each token


class Varlen(NamedTuple):
    """One sequence per response: queries are tokens in their packed order, keys the prompt and the response.

    The first response of a group asks for the prompt's tokens too. Flash attention lays its causal mask on the bottom
    right corner, so the queries of a response see its whole prompt and their own past, without any mask.
    """

    query_starts: Tensor  # [N + 1] int32
    key_starts: Tensor  # [N + 1] int32
    longest_query: int
    longest_key: int
    keys: Tensor  # [K] the token of each key
    copies: Tensor  # [C, S] the keys that are copies of each token, -1 for none; C responses of the largest group


class Packed(NamedTuple):
    """N responses as one row of S tokens."""

    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [1, S]
    layout: Grouped | Varlen
    sources: Tensor  # [n] the token whose logits predict each scored token, in the order of response_mask
    targets: Tensor  # [n] the ids of the scored tokens
    scored: Tensor  # [n] the places of the scored tokens in response_ids, row by row
    response_ids: Tensor  # [N, T]
    response_mask: Tensor  # [N, T] bool

    def to(self, device: str | torch.device) -> Packed:
        """The same batch on a device."""
        fields = [value if isinstance(value, tuple) else to_device(value, device) for value in self]
        moved = Packed._make(fields)  # pyright: ignore[reportArgumentType] - the layout follows
        layout = [value if isinstance(value, int) else to_device(value, device) for value in self.layout]
        return moved._replace(layout=type(self.layout)._make(layout))


def packable_type(model: Module) -> bool:
    """Whether packed numbers of this type of model are tested."""
    config = getattr(getattr(model, "module", model), "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "model_type", None) in PACKABLE and kinds <= {"full_attention", "sliding_attention"}


def packable(model: Module, longest: int) -> bool:
    """Whether `model` takes `Packed` batches of responses of `longest` tokens with their prompt.

    A sliding window is left out of the layouts: it must be no shorter than that, and then it hides nothing.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return packable_type(model) and (not window or window >= longest)


def takes_varlen(model: Module) -> bool:
    """Whether torch's flash attention covers the model: on a GPU, in 16 bits, heads of at most 256 units."""
    weight = next(model.parameters())
    config = getattr(getattr(model, "module", model), "config", None)
    heads = getattr(config, "num_attention_heads", None)
    units = getattr(config, "head_dim", None) or (heads and getattr(config, "hidden_size", 0) // heads) or math.inf
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and units <= 256 and units % 8 == 0


def group_prompts(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], most: float = GROUP_TOKENS
) -> list[list[int]]:
    """Return the indices of the responses in groups that share one prompt, in order of appearance.

    `most`: tokens of a group with more than two responses.
    """
    groups: list[list[int]] = []
    open_group: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        group, size = open_group.get(key := tuple(prompt), ([], len(prompt)))
        if not group or (len(group) > 1 and size + len(response) > most):
            groups.append(group := [])
            size = len(prompt)
        group.append(index)
        open_group[key] = (group, size + len(response))
    return groups


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], varlen: bool = False) -> Packed:
    """Return the responses as one row of tokens, in which responses to an equal prompt share it."""
    groups = group_prompts(prompts, responses, math.inf if varlen else GROUP_TOKENS)
    ids: list[int] = []
    positions: list[int] = []
    sources: list[list[int]] = [[]] * len(responses)
    for group in groups:
        prompt, first = prompts[group[0]], len(ids)
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        for i in group:
            start = len(ids)
            ids.extend(responses[i])
            positions.extend(range(len(prompt), len(prompt) + len(responses[i])))
            sources[i] = [first + len(prompt) - 1, *range(start, len(ids) - 1)][: len(responses[i])]
    response_ids = np.zeros((len(responses), max(map(len, responses))), dtype=np.int64)
    mask = np.zeros(response_ids.shape, dtype=bool)
    for i, response in enumerate(responses):
        response_ids[i, : len(response)], mask[i, : len(response)] = response, True
    lengths = [(len(prompts[group[0]]), [len(responses[i]) for i in group]) for group in groups]
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        layout=_varlen(lengths) if varlen else _grouped(lengths),
        sources=torch.tensor([source for response_sources in sources for source in response_sources]),
        targets=torch.from_numpy(response_ids[mask]),
        scored=torch.from_numpy(np.flatnonzero(mask)),
        response_ids=torch.from_numpy(response_ids),
        response_mask=torch.from_numpy(mask),
    )


def _grouped(groups: Sequence[tuple[int, list[int]]]) -> Grouped:
    """The layout of groups, given as (tokens of the prompt, tokens of each response)."""
    sizes = [prompt + sum(responses) for prompt, responses in groups]
    length = max(sizes)
    cells = np.full((len(groups), length), -1, dtype=np.int64)
    owner = np.full((len(groups), length), -1, dtype=np.int64)  # 0: the prompt; r: its r-th response
    first = 0
    for row, (prompt, responses) in enumerate(groups):
        owners = np.repeat(np.arange(len(responses) + 1), [prompt, *responses])
        owner[row, : len(owners)] = owners
        cells[row, : len(owners)] = range(first, first + len(owners))
        first += len(owners)
    flat = cells.reshape(-1)
    owners = torch.from_numpy(owner)
    sees = torch.ones(length, length, dtype=torch.bool).tril() & (
        (owners == 0)[:, None, :] | (owners[:, :, None] == owners[:, None, :])
    )
    return Grouped(sees[:, None], torch.from_numpy(flat), torch.from_numpy(np.flatnonzero(flat >= 0)))


def _varlen(groups: Sequence[tuple[int, list[int]]]) -> Varlen:
    """The layout of groups, given as (tokens of the prompt, tokens of each response)."""
    queries: list[int] = []
    key_lengths: list[int] = []
    keys: list[np.ndarray] = []
    first = 0
    for prompt, responses in groups:
        start = first + prompt
        for number, length in enumerate(responses):
            queries.append(length + (prompt if number == 0 else 0))
            key_lengths.append(prompt + length)
            keys += [np.arange(first, first + prompt), np.arange(start, start + length)]
            start += length
        first = start
    tokens = np.concatenate(keys)
    # The number of each key among the copies of its token: keys sorted by token, then by place.
    order = np.argsort(tokens, kind="stable")
    counts = np.bincount(tokens, minlength=first)
    number = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
    copies = np.full((counts.max(), first), -1, dtype=np.int64)
    copies[number, tokens[order]] = order
    return Varlen(
        query_starts=_starts(queries),
        key_starts=_starts(key_lengths),
        longest_query=max(queries),
        longest_key=max(key_lengths),
        keys=torch.from_numpy(tokens),
        copies=torch.from_numpy(copies),
    )


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
