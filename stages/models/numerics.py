"""Stages - maths that several stages share: per-token log-probabilities, masked sums, and checks of shapes.

Axes: N responses, B pairs, T completion tokens (right-padded), V vocabulary. Results are float32 or better, in nats, 0
outside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from data_contracts.errors import ContractError
from stages.models.lazy import torch

if TYPE_CHECKING:
    import torch.utils.checkpoint
    from torch import Tensor


def token_logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    r"""Return log softmax(logits)[ids], in float32 whatever the model's dtype; 0 where the mask is False.

    Shapes: logits [N, T, V] (row t predicts token t), ids [N, T], mask [N, T] bool -> [N, T].
    """
    from stages.models.kernels import TokenLogps

    check_shapes("token_logps", ids=ids, mask=mask)
    logps = TokenLogps.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)).view(ids.shape)
    return torch.where(mask, logps, torch.zeros((), dtype=logps.dtype, device=logps.device))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the last axis inside the mask.

    It uses `where`: in a product, inf * 0 outside the mask would be NaN.
    """
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the last axis inside the mask; 0 for an empty row."""
    return masked_sum(values, mask) / mask.sum(-1).clamp_min(1)


def check_shapes(caller: str, **tensors: Tensor) -> None:
    """Raises: ContractError, naming `caller`, unless all the tensors have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ContractError(
            f"{caller}: shapes must agree, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )


def positions(mask: Tensor) -> Tensor:
    """Return the index of each scored token in its response, from 0. [N, T]; undefined outside the mask."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def left_align(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, mask) with the scored tokens of each row moved to its front, in order, and zeros behind them.

    Shapes: values [N, T] or [N, T, V], mask [N, T]. For losses that compare token i of one response with token i of
    another.
    """
    order = torch.argsort((~mask).to(torch.int8), dim=-1, stable=True)
    aligned = mask.gather(-1, order)
    index, keep = (
        (order, aligned) if values.ndim == mask.ndim else (order.unsqueeze(-1).expand_as(values), aligned.unsqueeze(-1))
    )
    return torch.where(
        keep, values.gather(1, index), torch.zeros((), dtype=values.dtype, device=values.device)
    ), aligned


def kl_divergence(p_logits: Tensor, q_logits: Tensor, mask: Tensor, chunk: int = 256) -> Tensor:
    r"""Return KL(softmax(p) || softmax(q)) at each position over the full vocabulary; 0 outside the mask.

    Computed in float32, in float64 for float64 logits.

    Shapes: logits [N, T, V], mask [N, T] bool -> [N, T]. Computed `chunk` positions at a time and recomputed in the
    backward pass, so that the float32 copies of both models' logits never exist for the whole length. A logit of -inf
    marks a token that cannot occur: it adds 0 where p excludes it.
    """
    return _over_vocabulary(_kl, p_logits, q_logits, mask, chunk)


def js_divergence(p_logits: Tensor, q_logits: Tensor, mask: Tensor, beta: float, chunk: int = 256) -> Tensor:
    r"""Return beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, of p = softmax(p_logits) and q =
    softmax(q_logits) at each position; 0 outside the mask. Shapes and memory as in `kl_divergence`.
    """

    def divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
        log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
        # A token that neither can produce: its log would be -inf, whose gradient is NaN.
        never = torch.isneginf(log_p) & torch.isneginf(log_q)
        p_part, q_part = torch.where(never, 0.0, log_p), torch.where(never, 0.0, log_q)
        log_m = torch.logaddexp(p_part + math.log(beta), q_part + math.log1p(-beta))
        return beta * _kl_of_logps(log_p, log_m) + (1 - beta) * _kl_of_logps(log_q, log_m)

    return _over_vocabulary(divergence, p_logits, q_logits, mask, chunk)


def _over_vocabulary(
    divergence: Callable[[Tensor, Tensor], Tensor], p_logits: Tensor, q_logits: Tensor, mask: Tensor, chunk: int
) -> Tensor:
    """A divergence of two models' logits [N, T, V] at each position, `chunk` positions at a time; [N, T]."""
    if p_logits.shape != q_logits.shape:
        raise ContractError(
            "a full-vocabulary KL needs two models of one vocabulary; "
            f"got logits {tuple(p_logits.shape)} and {tuple(q_logits.shape)}"
        )
    check_shapes("kl_divergence", mask=mask, logits=p_logits[..., 0])
    pieces = []
    for start in range(0, p_logits.shape[1], chunk):
        part = (p_logits[:, start : start + chunk], q_logits[:, start : start + chunk])
        if torch.is_grad_enabled() and any(piece.requires_grad for piece in part):
            pieces.append(torch.utils.checkpoint.checkpoint(divergence, *part, use_reentrant=False))
        else:
            pieces.append(divergence(*part))
    values = torch.cat(pieces, dim=1) if pieces else p_logits.new_zeros(mask.shape)
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    return _kl_of_logps(log_softmax(p_logits), log_softmax(q_logits))


def _kl_of_logps(log_p: Tensor, log_q: Tensor) -> Tensor:
    possible = ~torch.isneginf(log_p)
    # Two wheres: the inner one keeps inf - inf out of the backward pass.
    gap = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return (log_p.exp() * gap).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-softmax over the last axis, in float32 whatever the model's dtype (float64 stays float64)."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
