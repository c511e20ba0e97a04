"""Stages - a mask in vLLM's engine: ids without a token are never sampled. vLLM loads it by name (vllm.py)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from stages.sampling.vllm import BLANK_IDS


class BlankIds(LogitsProcessor):
    """Masks the embedding's padding rows. The reported log-probs are the model's own, before any mask."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.ids = torch.tensor(vllm_config.additional_config.get(BLANK_IDS, []), dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [N, V], masked in place."""
        if len(self.ids):
            return logits.index_fill_(1, self.ids, float("-inf"))
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The mask is the same for every request."""
