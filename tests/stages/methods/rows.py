"""Rows of random responses for tests: everything any method may need, and a step as the training loop takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from stages.methods import METHODS
from stages.methods.base import Pairs, Responses
from stages.models.numerics import kl_divergence, token_logps

VOCABULARY = 5

torch.set_num_threads(1)  # tensors of a few dozen numbers: threads only cost


@dataclass
class Response:
    """One response: two models' logits [T, V], and the constants that go with it."""

    policy: torch.Tensor
    reference: torch.Tensor
    teacher: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    importance: torch.Tensor
    old_logps: torch.Tensor

    def with_ones(self) -> Response:
        return Response(**{**self.__dict__, "weights": torch.ones_like(self.weights)})


@dataclass
class Row:
    chosen: Response
    rejected: Response
    gold: Response
    anchor: Response
    mismatched: Response
    numbers: dict[str, float]

    def leaves(self) -> list[torch.Tensor]:
        return [side.policy for side in (self.chosen, self.rejected, self.gold, self.anchor)]


def make_row(seed: int, lengths: Sequence[int] = (4, 2, 3, 3), same: bool = False) -> Row:
    """`same`: policy and reference are one model (and the old policy and the mismatched pair's too)."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(0.0, 1.0, shape))

    def response(length: int) -> Response:
        reference, ids = draw(length, VOCABULARY), torch.from_numpy(random.integers(0, VOCABULARY, length))
        policy = reference.clone() if same else reference + 0.5 * draw(length, VOCABULARY)
        old = policy if same else reference + 0.2 * draw(length, VOCABULARY)
        everywhere = torch.ones(1, length, dtype=torch.bool)
        return Response(
            policy.requires_grad_(),
            reference,
            draw(length, VOCABULARY),
            ids,
            torch.from_numpy(random.uniform(0.3, 2.0, length)),
            torch.from_numpy(random.uniform(0.0, 3.0, length)),
            token_logps(old.detach()[None], ids[None], everywhere)[0],
        )

    numbers = {
        "win_rate_chosen": 0.8,
        "win_rate_rejected": 0.3,
        "score_chosen": 1.3,
        "score_rejected": -0.4,
        "advantage": 0.7,
        "log_z": 0.2,
    }
    numbers = {name: value + 0.1 * float(random.normal()) for name, value in numbers.items()}
    return Row(*(response(length) for length in (*lengths, 2)), numbers)


def stack(
    responses: Sequence[Response], needs: frozenset[str], left: int = 0, right: int = 0, fill: float = 0.0
) -> Responses:
    """Pad [T] and [T, V] rows to one batch, `fill` outside the mask."""
    width = left + max(len(response.ids) for response in responses) + right

    def pad(values: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = []
        for value in values:
            before = value.new_full((left, *value.shape[1:]), fill)
            after = value.new_full((width - left - len(value), *value.shape[1:]), fill)
            rows.append(torch.cat([before, value, after]))
        return torch.stack(rows)

    mask = pad([torch.ones_like(response.ids) for response in responses]) if fill == 0.0 else None
    if mask is None:
        mask = torch.zeros(len(responses), width)
        for number, response in enumerate(responses):
            mask[number, left : left + len(response.ids)] = 1
    mask = mask.bool()
    ids = pad([response.ids for response in responses]).clamp(0, VOCABULARY - 1)
    policy, reference = (pad([getattr(response, name) for response in responses]) for name in ("policy", "reference"))
    logps, reference_logps = (torch.where(mask, token_logps(logits, ids, mask), fill) for logits in (policy, reference))
    has_importance = bool(needs & {"importance", "importance_max_logit"})
    both = {"kl_policy_reference": (policy, reference), "kl_reference_policy": (reference, policy)}
    kl = next((kl_divergence(*both[need], mask) for need in needs if need in both), None)
    return Responses(
        logps,
        reference_logps.detach() if "reference" in needs else None,
        pad([response.weights for response in responses]),
        mask,
        kl=kl,
        importance=pad([response.importance for response in responses]) if has_importance else None,
        importance_range=torch.tensor([[0.0, 4.0]] * len(responses), dtype=torch.float64) if has_importance else None,
        old_logps=pad([response.old_logps for response in responses]) if "old_policy" in needs else None,
        logits=policy if "policy_logits" in needs else None,
        teacher_logits=pad([response.teacher for response in responses]) if "teacher_logits" in needs else None,
        teacher_mask=mask if "teacher_logits" in needs else None,
    )


def stack_pairs(rows: Sequence[Row], method: Any, config: Any, **padding: Any) -> Pairs:
    needs = method.needs(config)
    sides = {
        side: stack([getattr(row, side) for row in rows], needs, **padding) for side in ("chosen", "rejected", "gold")
    }
    numbers = {name: torch.tensor([row.numbers[name] for row in rows], dtype=torch.float64) for name in rows[0].numbers}
    extra = {
        name: stack([getattr(row, name) for row in rows], frozenset({"reference"}), **padding)
        for name in ("anchor", "mismatched")
        if name in needs
    }
    return Pairs(
        sides["chosen"],
        sides["rejected"] if "rejected" in method.sides(config) else None,
        numbers["win_rate_chosen"],
        numbers["win_rate_rejected"],
        numbers["score_chosen"],
        numbers["score_rejected"],
        gold=sides["gold"],
        values={name: numbers[name] for name in ("advantage", "log_z") if name in needs},
        **extra,
    )


def step_loss(
    name: str, settings: dict[str, Any], rows: Sequence[Row], cuts: Sequence[int] = (), **padding: Any
) -> torch.Tensor:
    """The loss of one optimizer step over `rows`, in micro-batches that begin at `cuts`, as the loop adds it up."""
    method = METHODS.get(name)
    config = method.Config(**settings)
    borders = [0, *cuts, len(rows)]
    batches = [stack_pairs(rows[a:b], method, config, **padding) for a, b in pairwise(borders)]
    counts = [method.token_count(config, pairs) for pairs in batches]
    tokens = sum(float(count.sum()) for count in counts)
    with torch.no_grad():
        parts = [method.step_values(config, pairs) for pairs in batches]
    step = {key: torch.cat([part[key] for part in parts]).mean() for key in parts[0]}
    return sum(method.pair_loss(config, pairs._replace(step_means=step)).share(len(rows), tokens) for pairs in batches)


def gradients(loss: torch.Tensor, rows: Sequence[Row]) -> list[torch.Tensor]:
    leaves = [leaf for row in rows for leaf in row.leaves()]
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    ]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS.table),
    ("dpo", {"label_smoothing": 0.1}),
    ("dpo", {"label_smoothing": 0.1, "robust": True}),
    ("spin", {"loss": "hinge"}),
    ("spin", {"loss": "exponential"}),
    ("ipo", {"average": True}),
    ("ipo", {"unit_scale": True}),
    ("tpo", {"length_normalised": True, "beta": 2.0, "gamma": 0.5}),
    ("sppo", {"eta": 2.0, "halve": True}),
    ("sppo", {"eta": 2.0, "target": "hard", "scale": "unit"}),
    ("sppo", {"eta": 2.0, "keep": "all"}),
    ("sppo", {"eta": 2.0, "keep": "all", "log_z": True}),
    ("tdpo", {"version": 1}),
    *(
        ("swift", {"weight_mode": mode, "kl_mode": kl})
        for mode in ("multiply", "divide")
        for kl in ("none", "paper", "tdpo", "supp")
    ),
    ("tis_dpo", {"use_eta": True}),
    ("tis_dpo", {"use_eta": True, "alpha": 0.5}),
    ("tidpo", {"lengths": "zero"}),
    ("tidpo", {"lengths": "mean", "importance": "given"}),
    ("tidpo", {"normalise_over": "sequence"}),
    ("tidpo", {"gamma": 0.0}),
    ("tidpo", {"version": "v3"}),
    ("tidpo", {"version": "v3", "hybrid": {"variant": "code"}, "gamma": 0.0}),
    ("inpo", {"rho": 0.0}),
    ("kd", {"direction": "jsd", "rate": 1.0, "beta": 0.1}),
    ("kd", {"direction": "reverse", "rate": 1.0, "tau": 2.0, "scale_tau2": True}),
    ("uld", {"rate": 1.0}),
]
"""Every method, and the settings that change its formula."""


def variant_id(value: Any) -> str:
    return (
        str(value)
        if not isinstance(value, dict)
        else ",".join(f"{key}={item}" for key, item in value.items()) or "default"
    )
