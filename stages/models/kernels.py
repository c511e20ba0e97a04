r"""Stages - the two inner loops of every pass: attention over packed responses, and log-probabilities out of logits.

A packed batch is one row of tokens without padding, in which a prompt stands once, followed by its responses.
Everything in a transformer but attention treats tokens one by one, so only attention has to know: its queries, keys and
values are moved into one padded row per prompt, where a token sees its prompt and the earlier tokens of its own
response, and the result is moved back.

Axes: S packed tokens, G groups (a prompt and its responses), L cells of the longest group, H heads, D units of a head,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from stages.models.packing import Grouped, Varlen

NAME = "packed_or_sdpa"
"""The attention's name among transformers' implementations."""
SHORT = 512
"""Groups up to this long take plain products in bf16 on a CPU: torch's fused kernel takes 2-4 times as long there,
mostly backwards.
"""
CHUNKS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist in float32 at a time, by type of device: what a CPU's cache holds, half a GiB of a GPU's memory."""
MOST_LOGITS = 1 << 29
"""A training on a GPU keeps up to so many logits for its backward pass, and computes more of them twice instead."""


def register() -> str:
    """Register `attention` with transformers, with its `sdpa` masks for unpacked batches. Returns the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Grouped | Varlen | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return softmax attention. `packing`: layout of a packed batch; None: transformers' own, over padded rows.

    Shapes: query [1, H, S, D], key and value with H or fewer heads, attention_mask [G, 1, L, L] bool -> [1, S, H, D].
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(packing, Varlen):
        return _varlen_attention(query, key, value, packing, scaling), None
    mask, cells, tokens = packing
    groups, _, length, _ = mask.shape
    heads, _, units = query.shape[1:]

    def spread(rows: Tensor) -> Tensor:
        """[1, h, S, D] -> [G, H, L, D], heads repeated where there are fewer than H."""
        out = move(rows[0].transpose(0, 1), cells, tokens).view(groups, length, rows.shape[1], units).transpose(1, 2)
        if rows.shape[1] == heads:
            return out
        return out.repeat_interleave(heads // rows.shape[1], dim=1)

    grouped = (spread(query), spread(key), spread(value))
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and length <= SHORT:
        out = _products(*grouped, mask, scaling or units**-0.5)
    else:
        out = functional.scaled_dot_product_attention(*grouped, attn_mask=mask, scale=scaling)
    return move(out.transpose(1, 2).reshape(groups * length, heads, units), tokens, cells)[None], None


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float | None) -> Tensor:
    """Return flash attention of all responses in one call: [1, H, S, D] -> [1, S, H, D].

    Keys and values may have fewer heads than H.
    """
    rows = query[0].transpose(0, 1).contiguous()
    keys, values = (copy_keys(part[0].transpose(0, 1), layout.keys, layout.copies) for part in (key, value))
    return flash(rows, keys, values, layout, scale)[None]


def flash(query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float | None) -> Tensor:
    """Causal attention of sequences of many lengths, aligned at their ends: [S, H, D], twice [K, h, D] -> [S, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        key,
        value,
        layout.query_starts,
        layout.key_starts,
        layout.longest_query,
        layout.longest_key,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return cast(Tensor, out)


def copy_keys(rows: Tensor, keys: Tensor, copies: Tensor) -> Tensor:
    """Return rows `keys` of a tensor [S, h, D]; a row may be read more than once. `copies`: see packing.Varlen."""
    return cast(Tensor, _CopyKeys.apply(rows, keys, copies))


class _CopyKeys(torch.autograd.Function):
    """`copy_keys`; backwards it adds up the copies of each row, each by a plain read."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return rows.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        total = gradients[0].index_select(0, copies[0])
        for copy in copies[1:]:
            total = total + _read(gradients[0], copy)
        return total, None, None


def move(rows: Tensor, index: Tensor, back: Tensor) -> Tensor:
    """Return rows `index` of a tensor [n, h, D]; an index of -1 gives a row of zeros. `back` is the inverse index."""
    return cast(Tensor, _Move.apply(rows, index, back))


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    return torch.softmax(query * scale @ key.transpose(-1, -2) + bias, -1) @ value


class _Move(torch.autograd.Function):
    """`move`; backwards it reads by the inverse index, where torch would do a scattered addition."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return _read(rows, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        _, back = ctx.saved_tensors
        return _read(gradient, back), None, None


def _read(rows: Tensor, index: Tensor) -> Tensor:
    out = rows.index_select(0, index.clamp_min(0))
    return out.masked_fill_((index < 0).view(-1, 1, 1), 0.0)


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[ids] of n tokens, with `CHUNKS` logits in float32 at a time, forwards and backwards. [n, V],
    [n] -> [n].
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        normaliser = torch.empty(ids.shape, dtype=wide, device=logits.device)
        for part in _parts(logits):
            torch.logsumexp(logits[part].to(wide), -1, out=normaliser[part])
        ctx.save_for_backward(logits, ids, normaliser)
        return logits.gather(-1, ids[:, None])[:, 0].to(wide) - normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """d logp / d logits = onehot(id) - softmax(logits)."""
        (gradient,) = gradients
        logits, ids, normaliser = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part in _parts(logits):
            g = gradient[part, None]
            rows = (logits[part].to(normaliser.dtype) - normaliser[part, None]).exp_().mul_(-g)
            out[part] = rows.scatter_add_(-1, ids[part, None], g)
        return out, None


def _parts(logits: Tensor) -> list[slice]:
    size = max(1, CHUNKS[logits.device.type] // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def fuses(head: torch.nn.Module | None, tokens: int) -> bool:
    """Whether the log-probs of so many tokens are computed by `head_logps`, instead of out of logits [tokens, V].

    On GPUs: always without gradients, and with them where the logits would take gigabytes.
    """
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_cuda:
        return False
    return not torch.is_grad_enabled() or tokens * head.out_features > MOST_LOGITS


def head_logps(head: torch.nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    """Return log softmax(head(hidden))[ids] in float32 or better, without ever holding [n, V]. [n, H], [n] -> [n]."""
    return cast(Tensor, _HeadLogps.apply(hidden, head.weight, head.bias, ids))


class _HeadLogps(torch.autograd.Function):
    """`head_logps`: a part of the vocabulary at a time, the log-sums joined as they come; backwards computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        normaliser = torch.full(ids.shape, -torch.inf, dtype=wide, device=hidden.device)
        scores = torch.zeros_like(normaliser)
        for part in _columns(hidden, weight):
            logits = _logits(hidden, weight, bias, part).to(wide)
            normaliser = torch.logaddexp(normaliser, torch.logsumexp(logits, -1))
            places, is_inside = _places(ids, part)
            scores = torch.where(is_inside, logits.gather(-1, places[:, None])[:, 0], scores)
        ctx.save_for_backward(hidden, weight, bias, ids, normaliser)
        return scores - normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """d logp / d logits = onehot(id) - softmax(logits), then as of any linear layer."""
        (gradient,) = gradients
        hidden, weight, bias, ids, normaliser = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype) if needs_hidden else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = torch.empty_like(bias) if needs_bias else None
        for part in _columns(hidden, weight):
            logits = _logits(hidden, weight, bias, part).to(normaliser.dtype)
            rows = (logits - normaliser[:, None]).exp_().mul_(-gradient[:, None])
            places, is_inside = _places(ids, part)
            rows.scatter_add_(-1, places[:, None], torch.where(is_inside, gradient, 0.0)[:, None])
            if of_bias is not None:
                of_bias[part] = rows.sum(0)
            rows = rows.to(weight.dtype)
            if of_hidden is not None:
                of_hidden += rows @ weight[part]
            if of_weight is not None:
                torch.mm(rows.t(), hidden, out=of_weight[part])
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, of_bias, None


def _columns(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Parts of the vocabulary of which `CHUNKS` logits are computed at a time."""
    size = max(128, CHUNKS[hidden.device.type] // max(1, len(hidden)) // 128 * 128)
    return [slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    logits = hidden @ weight[part].t()
    return logits if bias is None else logits + bias[part]


def _places(ids: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The places of ids inside a part of the vocabulary (any place for those outside), and which are inside."""
    places = ids - part.start
    return places.clamp(0, part.stop - part.start - 1), (places >= 0) & (ids < part.stop)
