"""Stages - a causal language model and the log-probabilities of responses under it: one implementation for weigh, train and evaluate.

Axes: N responses, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary. Rows are aligned on the seam between
prompt and response, so the logits of the last T + 1 positions are all that is needed, for any model class.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stages.models.lazy import torch
from stages.models.numerics import token_logps
from stages.running.cost import loading

if TYPE_CHECKING:
    from torch import Tensor


class Batch(NamedTuple):
    input_ids: Tensor  # [N, P + T]
    attention_mask: Tensor  # [N, P + T]
    position_ids: Tensor  # [N, P + T]
    response_ids: Tensor  # [N, T]
    response_mask: Tensor  # [N, T] bool

    def to(self, device: Any) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


class Packed(NamedTuple):
    """The same responses without padding, as one row of S tokens, every prompt once: see stages/models/kernels.py. n scored tokens in all."""

    input_ids: Tensor  # [1, S]
    attention_mask: Tensor  # [G, 1, L, L] bool: which cell of a group sees which
    position_ids: Tensor  # [1, S]
    cells: Tensor  # [G * L] the token in each cell of the groups, -1 for none
    tokens: Tensor  # [S] the cell of each token
    sources: Tensor  # [n] the token whose logits predict each scored token, in the order of response_mask
    response_ids: Tensor  # [N, T]
    response_mask: Tensor  # [N, T] bool

    def to(self, device: Any) -> Packed:
        return Packed(*(tensor.to(device) for tensor in self))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Pad prompts left and responses right. Padding ids are 0: they are masked, so any valid id will do."""
    longest_prompt, longest = max(map(len, prompts)), max(map(len, responses))
    ids = np.zeros((len(prompts), longest_prompt + longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, longest_prompt - len(prompt) : longest_prompt] = prompt
        ids[row, longest_prompt : longest_prompt + len(response)] = response
        mask[row, longest_prompt - len(prompt) : longest_prompt + len(response)] = 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    tensors = [torch.from_numpy(array) for array in (ids, mask, positions)]
    return Batch(*tensors, tensors[0][:, longest_prompt:], tensors[1][:, longest_prompt:].bool())


GROUP_TOKENS = 512
"""Longest group of more than two responses: what attention pays for responses that do not see each other grows with the square."""


def group_prompts(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of responses in groups of one prompt each, in order of appearance."""
    groups: list[list[int]] = []
    open_group: dict[tuple[int, ...], tuple[list[int], int]] = {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        group, size = open_group.get(key := tuple(prompt), ([], len(prompt)))
        if not group or (len(group) > 1 and size + len(response) > GROUP_TOKENS):
            groups.append(group := [])
            size = len(prompt)
        group.append(index)
        open_group[key] = (group, size + len(response))
    return groups


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Packed:
    """One row of tokens; responses to an equal prompt share it. The arguments are those of `collate`."""
    groups = group_prompts(prompts, responses)
    sizes = [len(prompts[group[0]]) + sum(len(responses[i]) for i in group) for group in groups]
    length, longest = max(sizes), max(map(len, responses))
    ids, positions, sources = [], [], [[]] * len(responses)
    cells = np.full((len(groups), length), -1, dtype=np.int64)
    owner = np.full((len(groups), length), -1, dtype=np.int64)  # 0: the prompt; r: its r-th response
    for row, group in enumerate(groups):
        prompt, first = prompts[group[0]], len(ids)
        ids.extend(prompt)
        positions.extend(range(len(prompt)))
        owner[row, : len(prompt)] = 0
        for number, i in enumerate(group, start=1):
            start = len(ids)
            ids.extend(responses[i])
            positions.extend(range(len(prompt), len(prompt) + len(responses[i])))
            owner[row, start - first : len(ids) - first] = number
            sources[i] = [first + len(prompt) - 1, *range(start, len(ids) - 1)][: len(responses[i])]
        cells[row, : len(ids) - first] = range(first, len(ids))
    response_ids = np.zeros((len(responses), longest), dtype=np.int64)
    mask = np.zeros(response_ids.shape, dtype=bool)
    for i, response in enumerate(responses):
        response_ids[i, : len(response)], mask[i, : len(response)] = response, True
    flat = cells.reshape(-1)
    tokens = np.flatnonzero(flat >= 0)
    owners = torch.from_numpy(owner)
    sees = torch.ones(length, length, dtype=torch.bool).tril() & (
        (owners == 0)[:, None, :] | (owners[:, :, None] == owners[:, None, :])
    )
    tensors = [
        torch.tensor([ids]),
        sees[:, None],
        torch.tensor([positions]),
        torch.from_numpy(flat),
        torch.from_numpy(tokens),
    ]
    tensors += [
        torch.tensor([source for of in sources for source in of]),
        torch.from_numpy(response_ids),
        torch.from_numpy(mask),
    ]
    return Packed(*tensors)


PACKABLE = frozenset({"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "olmo2", "phi3", "smollm3"})
"""Model types (config.json) whose packed numbers are tested to be the padded ones; all others are padded."""


def packable(model: Any) -> bool:
    """Whether `model` takes `Packed` batches. A sliding window would have to be laid over the groups: such a model is padded."""
    config = getattr(getattr(model, "module", model), "config", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return getattr(config, "model_type", None) in PACKABLE and kinds == {"full_attention"} and not window


def load_causal_lm(directory: str, dtype: str, device: str) -> Any:
    """The model, without dropout and without a generation cache.

    Policy and reference must be the same function at the start of training: dropout would make their log-ratios noise.
    """
    from stages.models.kernels import register

    with loading():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    model.config.use_cache = False
    if packable(model):
        model.set_attn_implementation(register())
    return model.to(device)


def response_logits(model: Any, batch: Batch) -> Tensor:
    """Row t predicts response token t: the logits at input position P - 1 + t. [N, T, V]."""
    length = batch.response_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=length + 1,
    )
    return output.logits[:, :-1]


def response_logps(model: Any, batch: Batch | Packed) -> Tensor:
    """log pi(y_t | x, y_<t) for every response token, float32, 0 outside the mask. [N, T]."""
    if isinstance(batch, Batch):
        return token_logps(response_logits(model, batch), batch.response_ids, batch.response_mask)
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.sources,
        packing=(batch.cells, batch.tokens),
    )
    ids = batch.response_ids[batch.response_mask]
    logps = token_logps(output.logits[0], ids, torch.ones_like(ids, dtype=torch.bool))
    return logps.new_zeros(batch.response_ids.shape).masked_scatter(batch.response_mask, logps)


def batches_by_budget(lengths: Sequence[int], budget: int, cells: float = math.inf) -> Iterator[list[int]]:
    """Indices in batches of at most `budget` padded tokens and `cells` of an attention matrix (one row at least), longest first.

    Longest first shows an out-of-memory at once; equal lengths beside each other waste the least padding. Deterministic: ties by index.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest, rows = lengths[batch[0]] if batch else 0, len(batch) + 1
        if rows * longest > budget or rows * longest**2 > cells:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def batches_by_sum(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in as few batches as a budget on the sum of lengths allows (one row at least), filled evenly, longest first. Deterministic."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def fill(limit: int) -> list[list[int]]:
        batches, room = [], 0
        for index in order:
            if lengths[index] > room or not batches:
                batches.append([])
                room = limit
            batches[-1].append(index)
            room -= lengths[index]
        return batches

    fewest, low, high = len(fill(budget)), 1, budget
    while low < high:  # the smallest limit that needs no more batches: the peak of memory is that of the fullest one
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) == fewest else (middle + 1, high)
    return fill(low)


def score_responses(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int
) -> list[np.ndarray]:
    """Per-token log-probs of every response under a frozen model, float32, in the order given."""
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    device = next(model.parameters()).device
    if together := packable(model):
        groups = group_prompts(prompts, responses)
        sizes = [len(prompts[group[0]]) + sum(len(responses[i]) for i in group) for group in groups]
        batches = [[i for number in batch for i in groups[number]] for batch in batches_by_sum(sizes, budget)]
    else:
        batches = list(batches_by_budget(lengths, budget))
    with torch.inference_mode():
        for rows in batches:
            build = pack if together else collate
            batch = build([prompts[i] for i in rows], [responses[i] for i in rows]).to(device)
            logps = response_logps(model, batch).float().cpu().numpy()
            for i, row in zip(rows, logps, strict=True):
                results[i] = row[: len(responses[i])].copy()
    return results


def pick_device(wanted: str) -> str:
    """`auto` is the accelerator if there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def pin_threads(count: int | None) -> None:
    """Use as many CPU threads as asked, by default as many as this process may run on."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
