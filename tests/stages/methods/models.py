"""Models for tests: a tiny random Llama, and a table that says the next token from the last one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def tiny_llama(seed: int = 0, vocabulary: int = 32, dtype: torch.dtype = torch.float64) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class TableModel(torch.nn.Module):
    """logits at position p are row `table[ids[p]]`: what comes next depends on the last token alone."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])
