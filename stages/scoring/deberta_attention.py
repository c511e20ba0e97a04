r"""Stages - DeBERTa-v2's disentangled attention, the same numbers in less time: what makes PairRM's forward cheap.

    s_ij = (q_i k_j + q_i K_{t(i-j)} + k_j Q_{t(i-j)}) / sqrt(3 d)

(He et al. 2021, arXiv:2006.03654, Eq. 4), with K and Q the projected embeddings of t(distance), distances beyond some buckets in logarithmic
steps. transformers gathers an [L, L] table of indices for every head, row and layer and divides three times. Here: t depends on i - j alone, so the
2 L - 1 distances are projected once per model, one product gives every q_i K_{t(d)}, and the term at (i, j) is read through strides, with no gather
and no table. The softmax is torch's fused one.

Axes: N rows, A heads, L tokens, D = 2 L - 1 distances, H hidden units of a head.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def make_fast(model: Any) -> bool:
    """Give the layers of a DebertaV2Model this attention. Returns: False, and changes nothing, for a configuration it does not cover."""
    config = model.config
    kinds = set(config.pos_att_type or ())
    if not (config.relative_attention and config.share_att_key and kinds == {"c2p", "p2c"} and config.position_buckets > 0):
        return False
    model.encoder.get_rel_pos = lambda *_, **__: None
    for layer in model.encoder.layer:
        layer.attention.self.forward = MethodType(attend, layer.attention.self)
    return True


def attend(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Stands in for `DisentangledSelfAttention.forward`, without dropout and without returning the probabilities."""
    rows, length, _ = hidden_states.shape

    def heads(x: Tensor) -> Tensor:  # [N, L, A H] -> [N, A, L, H]
        return x.view(x.shape[0], x.shape[1], self.num_attention_heads, -1).transpose(1, 2)

    query, key, value = heads(self.query_proj(hidden_states)), heads(self.key_proj(hidden_states)), heads(self.value_proj(hidden_states))
    scale = (3 * query.shape[-1]) ** -0.5
    buckets = distance_buckets(length, self.position_buckets, self.max_relative_positions, hidden_states.device)
    if getattr(self, "positions", None) is None or self.positions.device != query.device:
        # Frozen weights: the same for every input, and as many products as a row of 2 x buckets tokens.
        embeddings = rel_embeddings[: 2 * self.pos_ebd_size].unsqueeze(0)
        self.positions = torch.cat([heads(self.key_proj(embeddings)), heads(self.query_proj(embeddings))]) * scale
    # From distance L - 1 down to -(L - 1) for K, upward for Q: the orders in which rows of the product are read below.
    position_key, position_query = self.positions[:1, :, buckets.flip(0)], self.positions[1:, :, buckets]
    by_query, by_key = query @ position_key.transpose(-1, -2), key @ position_query.transpose(-1, -2)  # [N, A, L, D]
    bias = _skewed(by_query, length, False) + _skewed(by_key, length, True)
    bias = bias.masked_fill(~attention_mask[:, :, :1].bool().expand_as(bias[:, :1]), torch.finfo(bias.dtype).min)
    context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return context.transpose(1, 2).reshape(rows, length, -1), None


def _skewed(products: Tensor, length: int, transposed: bool) -> Tensor:
    """View of [N, A, L, 2 L - 1] as [N, A, L, L]: entry (i, j) is products[i, L - 1 - i + j], or products[j, L - 1 + i - j] if transposed."""
    products = products.contiguous()
    first, second, _, _ = products.stride()
    inner = (1, 2 * length - 2) if transposed else (2 * length - 2, 1)
    return products.as_strided((*products.shape[:2], length, length), (first, second, *inner), products.storage_offset() + length - 1)


def distance_buckets(length: int, buckets: int, longest: int, device: Any) -> Tensor:
    """t(d) for d = -(L - 1) ... L - 1, as rows of the embeddings. [D]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-(length - 1), length, device=device)
    found = make_log_bucket_position(distances, buckets, longest).to(torch.long)
    return (found + buckets).clamp(0, 2 * buckets - 1)
