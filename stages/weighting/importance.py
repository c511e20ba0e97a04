"""Stages - gradient attribution of many responses, in the form of a pass (see stages/models/logps.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from stages.methods.importance import Target, max_logit, mean_logp, token_importance
from stages.models.policy import batches_by_budget, collate

if TYPE_CHECKING:
    from torch.nn import Module


def score_importance(
    model: Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    budget: int,
    target: Target = mean_logp,
) -> list[np.ndarray]:
    """Raw attribution of every response token (methods/importance.py), float32, one array per response in their order.

    budget: padded tokens per forward.
    """
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in batches_by_budget(lengths, budget):
        batch = collate([prompts[row] for row in rows], [responses[row] for row in rows]).to(device)
        importance = token_importance(model, batch, target)[0].float().cpu().numpy()
        for row, values in zip(rows, importance, strict=True):
            results[row] = values[: len(responses[row])].copy()
    return results


score_max_logit_importance = partial(score_importance, target=max_logit)
"""The same of the largest logit behind each response (TI-DPO v3)."""
