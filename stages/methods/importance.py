"""Stages - gradient attribution: how much each input token moves the response's mean log-probability.

Axes: N responses, P prompt tokens, T response tokens, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.models.lazy import torch
from stages.models.numerics import masked_mean, token_logps

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.policy import Batch

DEGENERATE = 1e-12
"""A response whose importances differ by no more has no order to speak of: all its weights are 1."""


def token_importance(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    r"""I_i = || (1/T) sum_j d log pi(y_j | x, y_<j) / d e_i ||_1 with e_i the input embedding of token i (TI-DPO, Eq. 6-7).

    One backward for the whole batch: rows do not interact, and the gradient of a sum of means is the mean of the gradients. No
    parameter gets a gradient. Returns: [N, T] float32, 0 outside the mask, and the range over prompt and response [N, 2].
    The last response token moves no scored log-probability: its importance is exactly 0.
    """
    inner = getattr(model, "module", model)
    length = batch.response_ids.shape[1]
    training = inner.training
    inner.eval()
    try:
        with torch.enable_grad():
            embeddings = inner.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
            logits = inner(
                inputs_embeds=embeddings,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=length + 1,
            ).logits[:, :-1]
            total = masked_mean(token_logps(logits, batch.response_ids, batch.response_mask), batch.response_mask).sum()
            (gradient,) = torch.autograd.grad(total, embeddings)
    finally:
        inner.train(training)
    importance = gradient.float().abs().sum(-1) if gradient.dtype != torch.float64 else gradient.abs().sum(-1)
    inside = batch.attention_mask.bool()
    low = importance.masked_fill(~inside, float("inf")).amin(-1)
    high = importance.masked_fill(~inside, 0.0).amax(-1)
    response = importance[:, -length:] * batch.response_mask
    return response, torch.stack((low, high), dim=-1)


def min_max(importance: Tensor, mask: Tensor, span: Tensor | None = None) -> Tensor:
    r"""w_i = (I_i - min I) / (max I - min I) over the response's scored tokens, or over `span` [N, 2] (TI-DPO, Eq. 8-9).

    Shapes: [N, T] -> [N, T], 0 outside the mask. A response of one token, or of equal importances, gets ones.
    """
    if span is None:
        low = importance.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
        high = importance.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    else:
        low, high = span[:, :1], span[:, 1:]
    gap = high - low
    flat = (gap <= DEGENERATE) | (mask.sum(-1, keepdim=True) <= 1)
    weights = torch.where(
        flat, torch.ones_like(importance), (importance - low) / torch.where(flat, torch.ones_like(gap), gap)
    )
    return torch.where(mask, weights, torch.zeros_like(weights))
