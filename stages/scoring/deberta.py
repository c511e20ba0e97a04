r"""Stages - DeBERTa-v2's encoder for scoring: the numbers of transformers' DebertaV2Model in a fraction of the time.

    s_ij = (q_i k_j + q_i K_{t(i-j)} + k_j Q_{t(i-j)}) / sqrt(3 d)

(He et al. 2021, arXiv:2006.03654, Eq. 4), with K and Q the projected embeddings of the bucket t of a distance: single steps near by, logarithmic
ones far off. What is saved, in the order of what it brings on a CPU:

  - Every product of matrices goes to oneDNN. torch gives float32 ones to MKL, which leaves an AMD processor's wide registers idle: 110 against
    250 GFLOP/s on one core of the EPYC this was measured on.
  - K and Q are projected once per model, not once per forward, and the products with them are of the buckets that a length can reach.
  - The table of t is made once per batch. The term of k reads its product by columns, so that nothing is transposed; equal lengths need no mask.
  - The last layer only computes the tokens that are asked for.

Axes: N rows, L tokens, R tokens asked for (all of them but in the last layer), A heads, H units of a head, T buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Places(NamedTuple):
    """Where the scores of a batch find their terms of distance."""

    first: int
    last: int
    """The buckets first ... last - 1 can be reached."""
    by_query_NRL: Tensor
    """The cell of a [N R, T] product that the score of (i, j) takes its term of i from, counted through."""
    by_key_NRL: Tensor
    """The cell of a [T, N L] product for its term of j."""
    padding_N1L: Tensor | None
    """-inf behind the end of a row, 0 before; None: all rows are of one length."""


class Encoder:
    """A DebertaV2Model with its weights in place; in eval mode, on its device and in its dtype."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.num_heads = self.config.num_attention_heads
        weight = model.embeddings.word_embeddings.weight
        self.on_cpu = weight.device.type == "cpu"
        self.onednn = self.on_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        with torch.inference_mode():
            embeddings = model.encoder.get_rel_embedding()[: 2 * self.config.position_buckets]
            self.positions = [self._positions(layer.attention.self, embeddings) for layer in model.encoder.layer]

    def _positions(self, attention: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """K and Q of a layer, Q with the scale of the scores. [A, 2 buckets, H] each."""
        return self._heads(attention.key_proj(embeddings)), self._heads(attention.query_proj(embeddings) * self._scale(attention))

    @staticmethod
    def _scale(attention: Any) -> float:
        return (3 * attention.attention_head_size) ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """[M, A H] -> [A, M, H]."""
        return x.view(len(x), self.num_heads, -1).transpose(0, 1).contiguous()

    def __call__(self, ids_NL: Tensor, lengths: Sequence[int], wanted_NR: Tensor) -> Tensor:
        """Last hidden state of the wanted tokens. Rows are padded at their end. [N, R, A H]."""
        rows, length = ids_NL.shape
        embeddings, *layers, last = self.model.embeddings, *self.model.encoder.layer
        everywhere, wanted = self._places(None, ids_NL, lengths), self._places(wanted_NR, ids_NL, lengths)
        x = embeddings.LayerNorm(embeddings.word_embeddings(ids_NL)).view(rows * length, -1)
        for layer, positions in zip(layers, self.positions[:-1], strict=True):
            x = self._layer(layer, positions, x, x, everywhere)
        asked = (wanted_NR + length * torch.arange(rows, device=x.device)[:, None]).view(-1)
        return self._layer(last, self.positions[-1], x[asked], x, wanted).view(rows, wanted_NR.shape[1], -1)

    def _places(self, queries_NR: Tensor | None, ids_NL: Tensor, lengths: Sequence[int]) -> Places:
        """For some queries of each row, or all."""
        (rows, length), device = ids_NL.shape, ids_NL.device
        reached = distance_buckets(length, self.config, device)
        first, last = int(reached[0]), int(reached[-1]) + 1
        reached, keys = reached - first, torch.arange(length, device=device)
        if queries_NR is None:
            bucket = reached.flip(0).unfold(0, length, 1).flip(0).unsqueeze(0)
        else:
            bucket = reached[queries_NR[:, :, None] - keys + length - 1]
        count = bucket.shape[1]
        by_query = bucket + (last - first) * torch.arange(rows * count, device=device).view(rows, count, 1)
        by_key = bucket * (rows * length) + torch.arange(rows * length, device=device).view(rows, 1, length)
        padding = None
        if min(lengths) < length:
            padding = torch.zeros(rows, 1, length, device=device, dtype=self.positions[0][0].dtype)
            padding.masked_fill_((keys >= torch.tensor(lengths, device=device)[:, None])[:, None], -torch.inf)
        return Places(first, last, by_query, by_key, padding)

    def _layer(self, layer: Any, positions: tuple[Tensor, Tensor], queries: Tensor, x: Tensor, places: Places) -> Tensor:
        context = self._attention(layer.attention.self, positions, queries, x, places)
        dense = layer.attention.output
        queries = dense.LayerNorm(self._linear(context, dense.dense, add=queries))
        inner = self._linear(queries, layer.intermediate.dense, gelu=True)
        return layer.output.LayerNorm(self._linear(inner, layer.output.dense, add=queries))

    def _attention(self, module: Any, positions: tuple[Tensor, Tensor], queries: Tensor, x: Tensor, places: Places) -> Tensor:
        query = self._heads(self._linear(queries, module.query_proj) * self._scale(module))
        key, value = self._heads(self._linear(x, module.key_proj)), self._heads(self._linear(x, module.value_proj))
        position_key, position_query = (x[:, places.first : places.last] for x in positions)
        # One head at a time stays in a processor's cache; a GPU wants all of them in one call.
        heads = range(self.num_heads) if self.on_cpu else [slice(None)]
        found = [self._head(*(x[head] for x in (query, key, value, position_key, position_query)), places) for head in heads]
        return torch.cat(found, dim=-1) if self.on_cpu else found[0].transpose(0, 1).reshape(len(queries), -1)

    def _head(self, query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, position_query: Tensor, places: Places) -> Tensor:
        """Of one head, [N R, H], or of several, [A, N R, H]."""
        lead, (rows, count, length) = query.shape[:-2], places.by_query_NRL.shape
        by_query, by_key = self._product(query, position_key), self._product(position_query, key)  # [N R, T], [T, N L]
        bias = by_query.view(*lead, -1).index_select(-1, places.by_query_NRL.view(-1))
        bias += by_key.view(*lead, -1).index_select(-1, places.by_key_NRL.view(-1))
        bias = bias.view(*lead, rows, count, length)
        if places.padding_N1L is not None:
            bias += places.padding_N1L
        if self.onednn and rows == 1:
            weights = torch.softmax(self._product(query, key, bias[0]), dim=-1)
            return self._product(weights, value.t())
        query, key, value = (x.view(*lead, rows, -1, x.shape[-1]) for x in (query, key, value))
        if self.on_cpu:
            return (torch.softmax(torch.baddbmm(bias, query, key.mT), dim=-1) @ value).view(rows * count, -1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0).reshape(*lead, rows * count, -1)

    def _product(self, left: Tensor, right: Tensor, add: Tensor | None = None) -> Tensor:
        """left right^T, + add."""
        if self.onednn:
            return onednn_linear(left, right, None, add)
        return left @ right.transpose(-1, -2) if add is None else left @ right.transpose(-1, -2) + add

    def _linear(self, x: Tensor, module: Any, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        if self.onednn:
            return onednn_linear(x, module.weight, module.bias, add, gelu)
        x = functional.linear(x, module.weight, module.bias)
        return functional.gelu(x) if gelu else x if add is None else x + add


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x weight^T + bias, + add or through gelu, in one pass; what inductor makes of a linear layer on a CPU."""
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def covers(config: Any) -> bool:
    """Whether this is the kind of DeBERTa that is computed here: that of v3."""
    plain = not config.position_biased_input and config.type_vocab_size == 0 and getattr(config, "conv_kernel_size", 0) == 0
    attention = config.relative_attention and config.share_att_key and config.position_buckets > 0
    same = getattr(config, "embedding_size", config.hidden_size) == config.hidden_size
    return plain and attention and same and set(config.pos_att_type or ()) == {"c2p", "p2c"} and config.hidden_act == "gelu"


def distance_buckets(length: int, config: Any, device: Any) -> Tensor:
    """t(d) for d = -(L - 1) ... L - 1, as rows of the embeddings. [2 L - 1]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances, buckets = torch.arange(-(length - 1), length, device=device), config.position_buckets
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    return (make_log_bucket_position(distances, buckets, longest).to(torch.long) + buckets).clamp(0, 2 * buckets - 1)
