r"""Stages - DeBERTa-v2's encoder for scoring: the numbers of transformers' DebertaV2Model in a fraction of the time.

    s_ij = (q_i k_j + q_i K_{t(i-j)} + k_j Q_{t(i-j)}) / sqrt(3 d)

(He et al. 2021, arXiv:2006.03654, Eq. 4), with K and Q the projected embeddings of the bucket t of a distance: single steps near by, logarithmic
ones far off. What is saved, in the order of what it brings on a CPU:

  - Every product of matrices goes to oneDNN. torch gives float32 ones to MKL, which leaves an AMD processor's wide registers idle: 110 against
    250 GFLOP/s on one core of the EPYC this was measured on.
  - K and Q are projected once per model, not once per forward, and the products with them are of the buckets that a length can reach.
  - Where the terms of a score lie in those products is worked out once per batch; nothing is transposed, and rows of one length need no mask.
  - The last layer only computes the tokens that are asked for.

Axes: N rows, L tokens, R tokens asked for (all of them but in the last layer), A heads, H units of a head, T buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ONEDNN_FROM = 128
"""Hidden units from which oneDNN pays: it prepares itself anew for each number of rows, which narrow models do not earn back. Measured: 64 do
not, 256 do."""


class Places(NamedTuple):
    """Where the scores of a batch find their terms of distance."""

    first: int
    last: int
    """The buckets first ... last - 1 can be reached."""
    by_query: Tensor
    """The cell of a row's [R, T] product that the score of (i, j) takes its term of i from, counted through. [R L], or [N, R L]."""
    by_key: Tensor
    """The cell of a row's product for its term of j. [R L], or [N, R L]. The product is [L, T]; of a row by itself, which may be long,
    [T, L]: far off, where many j share a bucket, their terms lie side by side."""
    beyond_N1L: Tensor | None
    """-inf behind the end of a row, 0 before it; None: all rows are of one length."""


class Encoder:
    """A DebertaV2Model with its weights in place; in eval mode, on its device and in its dtype."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.num_heads = self.config.num_attention_heads
        weight = model.embeddings.word_embeddings.weight
        self.dtype = weight.dtype
        self.on_cpu = weight.device.type == "cpu"
        wide = self.config.hidden_size >= ONEDNN_FROM
        self.onednn = wide and self.on_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        with torch.inference_mode():
            embeddings = model.encoder.get_rel_embedding()[: 2 * self.config.position_buckets]
            self.positions = [self._positions(layer.attention.self, embeddings) for layer in model.encoder.layer]

    def _positions(self, attention: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """K and Q of a layer, Q with the scale of the scores. [A, 2 buckets, H] each."""
        return self._heads(attention.key_proj(embeddings)), self._heads(
            attention.query_proj(embeddings) * self._scale(attention)
        )

    @staticmethod
    def _scale(attention: Any) -> float:
        return (3 * attention.attention_head_size) ** -0.5

    def _heads(self, x: Tensor) -> Tensor:
        """[M, A H] -> [A, M, H]."""
        return x.view(len(x), self.num_heads, -1).transpose(0, 1).contiguous()

    def __call__(self, ids_NL: Tensor, lengths: Sequence[int], wanted_NR: Tensor) -> Tensor:
        """Last hidden state of the wanted tokens. Rows are padded at their end. [N, R, A H]."""
        (rows, length), device = ids_NL.shape, ids_NL.device
        embeddings, *layers, last = self.model.embeddings, *self.model.encoder.layer
        tokens = torch.arange(length, device=device)
        beyond = None
        if min(lengths) < length:
            behind = tokens >= torch.tensor(lengths, device=device)[:, None, None]
            beyond = torch.zeros(behind.shape, dtype=self.dtype, device=device).masked_fill_(behind, -torch.inf)
        reached = distance_buckets(length, self.config, device)
        everywhere = self._places(tokens, reached, beyond, rows)
        x = embeddings.LayerNorm(embeddings.word_embeddings(ids_NL)).view(rows * length, -1)
        for layer, positions in zip(layers, self.positions[:-1], strict=True):
            x = self._layer(layer, positions, x, x, everywhere, rows)
        asked = (wanted_NR + length * torch.arange(rows, device=device)[:, None]).view(-1)
        found = self._layer(last, self.positions[-1], x[asked], x, self._places(wanted_NR, reached, beyond, rows), rows)
        return found.view(rows, wanted_NR.shape[1], -1)

    @staticmethod
    def _places(queries: Tensor, reached: Tensor, beyond: Tensor | None, rows: int) -> Places:
        """For the queries of all rows, [R], or of each, [N, R]."""
        first, last, length = int(reached[0]), int(reached[-1]) + 1, (len(reached) + 1) // 2
        keys, number = (
            torch.arange(length, device=reached.device),
            torch.arange(queries.shape[-1], device=reached.device),
        )
        bucket = (reached - first)[queries[..., None] - keys + length - 1]
        by_query = bucket + (last - first) * number[:, None]
        by_key = bucket * length + keys if rows == 1 else bucket + (last - first) * keys
        return Places(first, last, by_query.flatten(-2), by_key.flatten(-2), beyond)

    def _layer(
        self, layer: Any, positions: tuple[Tensor, Tensor], queries: Tensor, x: Tensor, places: Places, rows: int
    ) -> Tensor:
        context = self._attention(layer.attention.self, positions, queries, x, places, rows)
        dense = layer.attention.output
        queries = dense.LayerNorm(self._linear(context, dense.dense, add=queries))
        inner = self._linear(queries, layer.intermediate.dense, gelu=True)
        return layer.output.LayerNorm(self._linear(inner, layer.output.dense, add=queries))

    def _attention(
        self, module: Any, positions: tuple[Tensor, Tensor], queries: Tensor, x: Tensor, places: Places, rows: int
    ) -> Tensor:
        query = self._heads(self._linear(queries, module.query_proj) * self._scale(module))
        key, value = self._heads(self._linear(x, module.key_proj)), self._heads(self._linear(x, module.value_proj))
        position_key, position_query = (x[:, places.first : places.last] for x in positions)
        # One head at a time stays in a processor's cache; a GPU wants all of them in one call.
        heads = range(self.num_heads) if self.on_cpu else [slice(None)]
        parts = [t.unflatten(1, (rows, -1)) for t in (query, key, value)]
        found = [self._head(*(t[head] for t in (*parts, position_key, position_query)), places) for head in heads]
        return torch.cat(found, dim=-1) if self.on_cpu else found[0].transpose(0, 1).reshape(len(queries), -1)

    def _head(
        self, query: Tensor, key: Tensor, value: Tensor, position_key: Tensor, position_query: Tensor, places: Places
    ) -> Tensor:
        """Of one head: query [N, R, H], key and value [N, L, H] -> [N R, H]; of several, each with A before."""
        position_key, position_query = position_key[..., None, :, :], position_query[..., None, :, :]
        left, right = (position_query, key) if key.shape[-3] == 1 else (key, position_query)
        bias = _taken(self._product(query, position_key), places.by_query)
        bias += _taken(self._product(left, right), places.by_key)
        bias = bias.view(*query.shape[:-1], -1)
        if places.beyond_N1L is not None:
            bias += places.beyond_N1L
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
        if add is not None and left.dim() == 3:
            return torch.baddbmm(add, left, right.mT)
        return left @ right.mT if add is None else left @ right.mT + add

    def _linear(self, x: Tensor, module: Any, gelu: bool = False, add: Tensor | None = None) -> Tensor:
        if self.onednn:
            return onednn_linear(x, module.weight, module.bias, add, gelu)
        x = functional.linear(x, module.weight, module.bias)
        return functional.gelu(x) if gelu else x if add is None else x + add


def _taken(products: Tensor, cells: Tensor) -> Tensor:
    """Those cells of each row's matrix. [..., N, m, n] -> [..., N, R L]."""
    products = products.flatten(-2)
    if cells.dim() > 1:  # other ones in every row
        return products.gather(-1, cells.expand(*products.shape[:-1], -1))
    if products.numel() == products.shape[-1]:  # of one row torch is faster by itself than as [1, n]
        return products.view(-1).index_select(0, cells)
    return products.index_select(-1, cells)


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """x weight^T + bias, + add or through gelu, in one pass; what inductor makes of a linear layer on a CPU."""
    if add is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")


def covers(config: Any) -> bool:
    """Whether this is the kind of DeBERTa that is computed here: that of v3."""
    plain = (
        not config.position_biased_input and config.type_vocab_size == 0 and getattr(config, "conv_kernel_size", 0) == 0
    )
    attention = config.relative_attention and config.share_att_key and config.position_buckets > 0
    same = getattr(config, "embedding_size", config.hidden_size) == config.hidden_size
    return (
        plain
        and attention
        and same
        and set(config.pos_att_type or ()) == {"c2p", "p2c"}
        and config.hidden_act == "gelu"
    )


def distance_buckets(length: int, config: Any, device: Any) -> Tensor:
    """t(d) for d = -(L - 1) ... L - 1, as rows of the embeddings. [2 L - 1]."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances, buckets = torch.arange(-(length - 1), length, device=device), config.position_buckets
    longest = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    return (make_log_bucket_position(distances, buckets, longest).to(torch.long) + buckets).clamp(0, 2 * buckets - 1)
