"""Stages - gradient attribution of many responses, in the form of a pass (see stages/models/logps.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.methods.importance import token_importance
from stages.models.policy import batches_by_budget, collate


def score_importance(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int
) -> list[np.ndarray]:
    """Raw attribution of every response token (methods/importance.py), float32, in the order given."""
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in batches_by_budget(lengths, budget):
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows]).to(device)
        values = token_importance(model, batch)[0].float().cpu().numpy()
        for i, row in zip(rows, values, strict=True):
            results[i] = row[: len(responses[i])].copy()
    return results
