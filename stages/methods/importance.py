"""Stages - gradient attribution: how much each input token moves the response's mean log-probability.

Axes: N responses, L tokens of the longest prompt with its response, T response tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from data_contracts.config import Config
from stages.models.lazy import torch
from stages.models.numerics import masked_mean, masked_sum, positions, token_logps
from stages.models.policy import response_logits

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

    from stages.models.policy import Batch

DEGENERATE = 1e-12
"""Importances of a response that differ by no more than this have no order to speak of: all weights are then 1."""


class HybridSettings(Config):
    """How TI-DPO v3 turns importances into weights."""

    lam: float = Field(0.7, ge=0, le=1)
    """Share of the importance; the rest is the Gaussian prior over positions."""
    sigma_div: float = Field(4.0, gt=0)
    """The prior's standard deviation is T / sigma_div tokens."""
    variant: Literal["paper", "code"] = "paper"
    """code: the public fork's, whose prior sums to 1 and is at least 1 token wide, and whose weights have mean 1."""


Target = Callable[["PreTrainedModel", "Batch", "Tensor"], "Tensor"]
"""(model, batch, input embeddings [N, L, H]) -> the number of each response [N] whose gradient is the attribution."""


def mean_logp(model: PreTrainedModel, batch: Batch, embeddings: Tensor) -> Tensor:
    """(1/T) sum_j log pi(y_j | x, y_<j): TI-DPO's target, Eq. 6. [N]."""
    logits = response_logits(model, batch, inputs_embeds=embeddings)
    return masked_mean(token_logps(logits, batch.response_ids, batch.response_mask), batch.response_mask)


def max_logit(model: PreTrainedModel, batch: Batch, embeddings: Tensor) -> Tensor:
    """The largest logit behind the response's last token: TI-DPO v3's target. [N]."""
    last = batch.in_row.sum(-1, keepdim=True) - 1
    logits = response_logits(model, batch._replace(sources=last), inputs_embeds=embeddings)
    return logits[:, 0].amax(-1)


def token_importance(model: Module, batch: Batch, target: Target = mean_logp) -> tuple[Tensor, Tensor]:
    r"""I_i = || d target / d e_i ||_1, e_i the input embedding of token i (TI-DPO, Eq. 6-7; v3 by `max_logit`).

    One backward for the whole batch: rows do not interact, and the gradient of a sum of means is the mean of the
    gradients. No parameter gets a gradient. `model` is a causal language model, or a wrapper that holds it as `module`.
    Returns: the importance [N, T] in float32 (float64 stays), 0 outside the mask, and its smallest and largest value
    over prompt and response [N, 2]. The last response token moves no scored log-probability: its importance is exactly
    0 (with `mean_logp`).
    """
    language_model = cast("PreTrainedModel", getattr(model, "module", model))
    was_training = language_model.training
    language_model.eval()
    try:
        importance = _embedding_gradient(language_model, batch, target).abs().sum(-1)
    finally:
        language_model.train(was_training)
    low = importance.masked_fill(~batch.in_row, float("inf")).amin(-1)
    high = importance.masked_fill(~batch.in_row, 0.0).amax(-1)
    # A response token stands behind the position that predicts it.
    places = torch.where(batch.response_mask, batch.sources + 1, 0)
    response = importance.gather(1, places) * batch.response_mask
    return response, torch.stack((low, high), dim=-1)


def _embedding_gradient(model: PreTrainedModel, batch: Batch, target: Target) -> Tensor:
    """Gradient of each response's target in the input embeddings [N, L, H], in float32 or better."""
    with torch.enable_grad():
        embeddings = cast("Tensor", model.get_input_embeddings()(batch.input_ids)).detach().requires_grad_()
        gradient: Tensor = torch.autograd.grad(target(model, batch, embeddings).sum(), embeddings)[0]
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


def hybrid(importance: Tensor, mask: Tensor, settings: HybridSettings) -> Tensor:
    r"""W_t = lam I_t / sum I + (1 - lam) exp(-((t - mu) / sigma)^2 / 2), mu = (T - 1) / 2, sigma = T / sigma_div.

    All importances 0: the prior alone. Variant `code`: sigma at least 1, the prior scaled to sum 1 and W to mean 1.
    Shapes: importance and mask [N, T] -> weights [N, T], 0 outside the mask (TI-DPO v3).

    >>> hybrid(torch.tensor([[3.0, 1.0]]), torch.tensor([[True, True]]), HybridSettings())  # mu 0.5, sigma 0.5
    tensor([[0.7070, 0.3570]])
    """
    size = mask.sum(-1, keepdim=True).clamp_min(1).to(importance.dtype)
    sigma = size / settings.sigma_div
    if settings.variant == "code":
        sigma = sigma.clamp_min(1)
    prior = torch.exp(-0.5 * ((positions(mask).to(importance.dtype) - (size - 1) / 2) / sigma) ** 2)
    if settings.variant == "code":
        prior = prior / masked_sum(prior, mask).unsqueeze(-1)
    total = masked_sum(importance, mask).unsqueeze(-1)
    share = importance / torch.where(total > 0, total, torch.ones_like(total))
    weights = torch.where(total > 0, settings.lam * share + (1 - settings.lam) * prior, prior)
    if settings.variant == "code":
        weights = weights * size / masked_sum(weights, mask).unsqueeze(-1)
    return torch.where(mask, weights, torch.zeros_like(weights))
