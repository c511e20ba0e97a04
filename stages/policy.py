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

from stages.cost import loading
from stages.lazy import torch
from stages.numerics import token_logps

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


def load_causal_lm(directory: str, dtype: str, device: str) -> Any:
    """The model, without dropout and without a generation cache.

    Policy and reference must be the same function at the start of training: dropout would make their log-ratios noise.
    """
    with loading():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    model.config.use_cache = False
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


def response_logps(model: Any, batch: Batch) -> Tensor:
    """log pi(y_t | x, y_<t) for every response token, float32, 0 outside the mask. [N, T]."""
    return token_logps(response_logits(model, batch), batch.response_ids, batch.response_mask)


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


def score_responses(model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int) -> list[np.ndarray]:
    """Per-token log-probs of every response under a frozen model, float32, in the order given."""
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    device = next(model.parameters()).device
    with torch.inference_mode():
        for rows in batches_by_budget(lengths, budget):
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows]).to(device)
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
