"""Stages - gradient attribution: how much each input token moves the response's mean log-probability.

Axes: N responses, L tokens of the longest prompt with its response, T response tokens, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stages.models.lazy import torch
from stages.models.numerics import masked_mean, token_logps
from stages.models.policy import response_logits

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from stages.models.policy import Batch

DEGENERATE = 1e-12
"""Importances of a response that differ by no more than this have no order to speak of: all weights are then 1."""


def token_importance(model: Module, batch: Batch) -> tuple[Tensor, Tensor]:
    r"""I_i = || (1/T) sum_j d log pi(y_j | x, y_<j) / d e_i ||_1, e_i the input embedding of token i (TI-DPO, Eq. 6-7).

    One backward for the whole batch: rows do not interact, and the gradient of a sum of means is the mean of the
    gradients. No parameter gets a gradient. `model` is a causal language model, or a wrapper that holds it as `module`.
    Returns: the importance [N, T] in float32 (float64 stays), 0 outside the mask, and its smallest and largest value
    over prompt and response [N, 2]. The last response token moves no scored log-probability: its importance is exactly
    0.
    """
    language_model = cast("PreTrainedModel", getattr(model, "module", model))
    was_training = language_model.training
    language_model.eval()
    try:
        importance = _embedding_gradient(language_model, batch).abs().sum(-1)
    finally:
        language_model.train(was_training)
    low = importance.masked_fill(~batch.in_row, float("inf")).amin(-1)
    high = importance.masked_fill(~batch.in_row, 0.0).amax(-1)
    # A response token stands behind the position that predicts it.
    places = torch.where(batch.response_mask, batch.sources + 1, 0)
    response = importance.gather(1, places) * batch.response_mask
    return response, torch.stack((low, high), dim=-1)


def _embedding_gradient(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Gradient of each response's mean log-prob in the input embeddings [N, L, H], in float32 or better."""
    with torch.enable_grad():
        embeddings = cast("Tensor", model.get_input_embeddings()(batch.input_ids)).detach().requires_grad_()
        logits = response_logits(model, batch, inputs_embeds=embeddings)
        mean_logps = masked_mean(token_logps(logits, batch.response_ids, batch.response_mask), batch.response_mask)
        gradient: Tensor = torch.autograd.grad(mean_logps.sum(), embeddings)[0]
    if gradient.dtype == torch.float64:
        return gradient
    return gradient.float()


def min_max(importance: Tensor, mask: Tensor, span: Tensor | None = None) -> Tensor:
    r"""w_i = (I_i - min I) / (max I - min I), over the response's tokens or over `span` [N, 2] (TI-DPO, Eq. 8-9).

    Shapes: importance and mask [N, T] -> weights [N, T], 0 outside the mask. A response of one token, or of equal
    importances, gets ones.

    >>> min_max(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, True, True]]))
    tensor([[0.0000, 1.0000, 0.5000]])
    """
    if span is None:
        low = importance.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
        high = importance.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    else:
        low, high = span[:, :1], span[:, 1:]
    gap = high - low
    is_flat = (gap <= DEGENERATE) | (mask.sum(-1, keepdim=True) <= 1)
    scaled = (importance - low) / torch.where(is_flat, torch.ones_like(gap), gap)
    weights = torch.where(is_flat, torch.ones_like(importance), scaled)
    return torch.where(mask, weights, torch.zeros_like(weights))
