"""Stages - maths that several stages share: per-token log-probabilities, masked sums, and checks of shapes.

Axes: N responses, B pairs, T completion tokens (right-padded), V vocabulary. Results are float32 or better, in nats, 0
outside the mask.
"""

from __future__ import annotations

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
    if p_logits.shape != q_logits.shape:
        raise ContractError(
            "a full-vocabulary KL needs two models of one vocabulary; "
            f"got logits {tuple(p_logits.shape)} and {tuple(q_logits.shape)}"
        )
    check_shapes("kl_divergence", mask=mask, logits=p_logits[..., 0])
    pieces = []
    for start in range(0, p_logits.shape[1], chunk):
        part = (p_logits[:, start : start + chunk], q_logits[:, start : start + chunk])
        tracked = torch.is_grad_enabled() and any(piece.requires_grad for piece in part)
        pieces.append(torch.utils.checkpoint.checkpoint(_kl, *part, use_reentrant=False) if tracked else _kl(*part))
    values = torch.cat(pieces, dim=1) if pieces else p_logits.new_zeros(mask.shape)
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    possible = ~torch.isneginf(log_p)
    # Two wheres: the inner one keeps inf - inf out of the backward pass.
    gap = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return (log_p.exp() * gap).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-softmax over the last axis, in float32 whatever the model's dtype (float64 stays float64)."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
