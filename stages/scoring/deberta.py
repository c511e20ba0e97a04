r"""Stages - DeBERTa-v2's encoder for scoring: the numbers of transformers' DebertaV2Model in a fraction of the time.

    s_ij = (q_i k_j + q_i K_{t(i-j)} + k_j Q_{t(i-j)}) / sqrt(3 d)

(He et al. 2021, arXiv:2006.03654, Eq. 4), where K and Q are the projected embeddings of the bucket t of a distance
(single steps near by, logarithmic ones far off) and d the width of a head. What saves time, in the order of its share
on a CPU:

  - Every product of matrices goes to oneDNN. torch gives float32 products to MKL, which leaves an AMD processor's wide
    registers idle: 110 against 250 GFLOP/s on one core of the EPYC this was measured on.
  - K and Q are projected once per model, not once per forward, and multiplied only at the buckets that a length
    reaches.
  - The positions of a score's terms in those products are computed once per batch; nothing is transposed, and rows of
    one length need no mask.
  - The last layer computes only the tokens that are asked for.

Axes: N rows, L tokens, R tokens asked for (all of them but in the last layer), A heads, H units of a head, T buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import DebertaV2Model

ONEDNN_FROM = 128
"""Hidden units from which oneDNN pays: it prepares itself anew for each number of rows, which narrow models do not earn
back. Measured: 64 do not, 256 do."""


class Distances(NamedTuple):
    """Where the scores of a batch find their terms of distance."""

    first: int
    last: int
    """The batch reaches the buckets first ... last - 1."""
    by_query: Tensor
    """The cell of a row's [R, T] product that holds the term of i in the score of (i, j), counted through. [R L], or
    [N, R L]."""
    by_key: Tensor
    """The cell of a row's product that holds the term of j. [R L], or [N, R L]. The product is [L, T]; for a single
    row, which may be long, [T, L]: far off, where many j share a bucket, their terms lie side by side."""
    padding_N1L: Tensor | None
    """-inf behind the end of a row, 0 before it; None: all rows have one length."""


class Encoder:
    """The forward of a DebertaV2Model that is on its device, in its dtype and in eval mode."""

    def __init__(self, model: DebertaV2Model):
        self.model, self.config = model, model.config
        self.num_heads = self.config.num_attention_heads
        weight = model.embeddings.word_embeddings.weight
        self.dtype = weight.dtype
        self.on_cpu = weight.device.type == "cpu"
        is_wide = self.config.hidden_size >= ONEDNN_FROM
        self.onednn = is_wide and self.on_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        with torch.inference_mode():
            encoder: Any = model.encoder  # its layers' attributes are not typed
            embeddings = encoder.get_rel_embedding()[: 2 * self.config.position_buckets]
            self.positions = [self._positions(layer.attention.self, embeddings) for layer in encoder.layer]

    def _positions(self, attention: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """K and Q of a layer, Q with the scale of the scores. [A, 2 buckets, H] each."""
        keys = self._heads(attention.key_proj(embeddings))
        return keys, self._heads(attention.query_proj(embeddings) * self._scale(attention))

    @staticmethod
    def _scale(attention: Any) -> float:
        return (3 * attention.attention_head_size) ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """[M, A H] -> [A, M, H]."""
        return x.view(len(x), self.num_heads, -1).transpose(0, 1).contiguous()

    def __call__(self, ids_NL: Tensor, lengths: Sequence[int], tokens_NR: Tensor) -> Tensor:
        """Return the last hidden states of the tokens at `tokens_NR`, [N, R, A H]. Rows are padded at their end."""
        (rows, length), device = ids_NL.shape, ids_NL.device
        embeddings, *layers, last = self.model.embeddings, *self.model.encoder.layer
        positions = torch.arange(length, device=device)
        padding = None
        if min(lengths) < length:
            is_behind = positions >= torch.tensor(lengths, device=device)[:, None, None]
            padding = torch.zeros(is_behind.shape, dtype=self.dtype, device=device).masked_fill_(is_behind, -torch.inf)
        buckets = distance_buckets(length, self.config, device)
        distances = self._distances(positions, buckets, padding, rows)
        x = embeddings.LayerNorm(embeddings.word_embeddings(ids_NL)).view(rows * length, -1)
        for layer, embedded in zip(layers, self.positions[:-1], strict=True):
            x = self._layer(layer, embedded, x, x, distances, rows)
        queries = (tokens_NR + length * torch.arange(rows, device=device)[:, None]).view(-1)
        distances = self._distances(tokens_NR, buckets, padding, rows)
        hidden = self._layer(last, self.positions[-1], x[queries], x, distances, rows)
        return hidden.view(rows, tokens_NR.shape[1], -1)

    @staticmethod
    def _distances(queries: Tensor, buckets: Tensor, padding: Tensor | None, rows: int) -> Distances:
        """For the same queries in all rows, [R], or other ones in each, [N, R]. `buckets`: of distance_buckets."""
        first, last, length = int(buckets[0]), int(buckets[-1]) + 1, (len(buckets) + 1) // 2
        keys = torch.arange(length, device=buckets.device)
        numbers = torch.arange(queries.shape[-1], device=buckets.device)
        bucket = (buckets - first)[queries[..., None] - keys + length - 1]
        by_query = bucket + (last - first) * numbers[:, None]
        by_key = bucket + (last - first) * keys
        if rows == 1:
            by_key = bucket * length + keys
        return Distances(first, last, by_query.flatten(-2), by_key.flatten(-2), padding)

    def _layer(
        self,
        layer: Any,
        positions: tuple[Tensor, Tensor],
        queries: Tensor,
        x: Tensor,
        distances: Distances,
        rows: int,
    ) -> Tensor:
        """One layer's output for the queries, [N R, A H]; `x`: the hidden states of all tokens, [N L, A H]."""
        context = self._attention(layer.attention.self, positions, queries, x, distances, rows)
        output = layer.attention.output
        queries = output.LayerNorm(self._linear(context, output.dense, add=queries))
        inner = self._linear(queries, layer.intermediate.dense, gelu=True)
        return layer.output.LayerNorm(self._linear(inner, layer.output.dense, add=queries))

    def _attention(
        self,
        module: Any,
        positions: tuple[Tensor, Tensor],
        queries: Tensor,
        x: Tensor,
        distances: Distances,
        rows: int,
    ) -> Tensor:
        query = self._heads(self._linear(queries, module.query_proj) * self._scale(module))
        key = self._heads(self._linear(x, module.key_proj))
        value = self._heads(self._linear(x, module.value_proj))
        query, key, value = (projected.unflatten(1, (rows, -1)) for projected in (query, key, value))
        keys, query_positions = (embedded[:, distances.first : distances.last] for embedded in positions)
        if not self.on_cpu:  # a GPU wants all heads in one call
            context = self._head(query, key, value, keys, query_positions, distances)
            return context.transpose(0, 1).reshape(len(queries), -1)
        # One head at a time stays in a processor's cache.
        heads = zip(query, key, value, keys, query_positions, strict=True)
        return torch.cat([self._head(*head, distances) for head in heads], dim=-1)

    def _head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_key: Tensor,
        position_query: Tensor,
        distances: Distances,
    ) -> Tensor:
        """The context of one head: query [N, R, H], key and value [N, L, H], positions [T, H] -> [N R, H]. Of several
        heads: each with A before."""
        position_key, position_query = position_key[..., None, :, :], position_query[..., None, :, :]
        left, right = key, position_query
        if key.shape[-3] == 1:
            left, right = position_query, key
        bias = _cells(self._product(query, position_key), distances.by_query)
        bias += _cells(self._product(left, right), distances.by_key)
        bias = bias.view(*query.shape[:-1], -1)
        if distances.padding_N1L is not None:
            bias += distances.padding_N1L
        if self.on_cpu:
            weights = torch.softmax(self._product(query, key, bias), dim=-1)
            context = self._product(weights, value.mT)
        else:
            context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return context.flatten(-3, -2)

    def _product(self, left: Tensor, right: Tensor, add: Tensor | None = None) -> Tensor:
        """left right^T, + add; over leading axes."""
        if self.onednn and len(right) == 1:
            return onednn_linear(left, right[0], None, add)
        if add is None:
            return left @ right.mT
        if left.dim() == 3:
            return torch.baddbmm(add, left, right.mT)
        return left @ right.mT + add

    def _linear(self, x: Tensor, module: Any, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        """The linear layer, through gelu or + add."""
        if self.onednn:
            return onednn_linear(x, module.weight, module.bias, add, gelu)
        x = functional.linear(x, module.weight, module.bias)
        if gelu:
            return functional.gelu(x)
        if add is None:
            return x
        return x + add


def _cells(products: Tensor, cells: Tensor) -> Tensor:
    """These cells of each row's matrix. [..., N, m, n] -> [..., N, R L]."""
    products = products.flatten(-2)
    if cells.dim() > 1:  # other cells in every row
        return products.gather(-1, cells.expand(*products.shape[:-1], -1))
    if products.numel() == products.shape[-1]:  # torch is faster with a single row as [n] than as [1, n]
        return products.view(-1).index_select(0, cells)
    return products.index_select(-1, cells)


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """x weight^T + bias, + add or through gelu, in one pass: what inductor makes of a linear layer on a CPU."""
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    activation, approximation = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], approximation)


def covers(config: Any) -> bool:
    """Whether `Encoder` computes this kind of DeBERTa: that of v3."""
    has_plain_embeddings = (
        not config.position_biased_input
        and config.type_vocab_size == 0
        and getattr(config, "conv_kernel_size", 0) == 0
        and getattr(config, "embedding_size", config.hidden_size) == config.hidden_size
    )
    has_bucketed_attention = (
        config.relative_attention
        and config.share_att_key
        and config.position_buckets > 0
        and set(config.pos_att_type or ()) == {"c2p", "p2c"}
    )
    return has_plain_embeddings and has_bucketed_attention and config.hidden_act == "gelu"


def distance_buckets(length: int, config: Any, device: Any) -> Tensor:
    """t(d) for d = -(L - 1) ... L - 1, as rows of the embeddings. [2 L - 1]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances, buckets = torch.arange(-(length - 1), length, device=device), config.position_buckets
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    return (make_log_bucket_position(distances, buckets, longest).to(torch.long) + buckets).clamp(0, 2 * buckets - 1)
