"""Stages - what a preference method is: settings, what it needs, and an unreduced loss over rows of responses.

Axes: B rows, T completion tokens (padded anywhere, `mask` says where), V vocabulary. A row is a pair (chosen, rejected), or for methods
on single responses one response, which then sits in `chosen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from data_contracts.config import Config
from stages.models.lazy import torch
from stages.models.numerics import check_shapes, masked_sum
from stages.registry import Named

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NEEDS = {
    "reference": "log-probs of the response tokens under the reference -> Responses.reference_logps",
    "old_policy": "log-probs of the tokens under the policy that sampled them -> Responses.old_logps",
    "kl_policy_reference": "KL(policy || reference) of every position, full vocabulary -> Responses.kl",
    "kl_reference_policy": "KL(reference || policy) of every position, full vocabulary -> Responses.kl",
    "policy_logits": "the policy's logits of the response positions -> Responses.logits",
    "teacher_logits": "a teacher's logits of its own tokens of the response -> Responses.teacher_logits, teacher_mask",
    "importance": "gradient attribution under the current policy -> Responses.importance (importance.token_importance)",
    "anchor": "an answer the policy samples during training as config.anchor says, scored by policy and reference -> Pairs.anchor",
    "mismatched": "each prompt with another row's response, policy (no gradient) and reference -> Pairs.mismatched",
    "win_rates": "mean preference over the K candidates -> Pairs.win_rate_chosen, win_rate_rejected",
    "scores": "scalar scores of the responses -> Pairs.score_chosen, score_rejected",
    "advantage": "the score within its prompt's group -> Pairs.values['advantage'] (row_values)",
    "log_z": "log partition over the prompt's candidates -> Pairs.values['log_z'] (row_values)",
}
"""Everything a method may ask of the stages before it and of the trainer, and where it expects it."""


class Responses(NamedTuple):
    """One side of B rows. Whatever the method does not need is None."""

    logps: Tensor
    """Policy log-probability of each token [B, T], with gradient; 0 outside the mask."""
    reference_logps: Tensor | None
    """The same tokens under the reference [B, T]; a constant."""
    weights: Tensor
    """Per-token weights [B, T] from the weigh stage; a constant."""
    mask: Tensor
    """Scored tokens [B, T], bool."""
    kl: Tensor | None = None
    """Full-vocabulary KL between policy and reference at each position [B, T], with gradient; numerics.kl_divergence."""
    importance: Tensor | None = None
    """Gradient attribution of each token [B, T], not normalised; a constant."""
    importance_range: Tensor | None = None
    """Smallest and largest importance over prompt and response [B, 2]; a constant."""
    old_logps: Tensor | None = None
    """The same tokens under the policy that sampled them [B, T]; a constant."""
    logits: Tensor | None = None
    """Policy logits [B, T, V], with gradient."""
    teacher_logits: Tensor | None = None
    """[B, T', V']: T' = T and V' = V where teacher and policy share a tokenizer; a constant."""
    teacher_mask: Tensor | None = None
    """[B, T'] bool; None: the policy's mask."""

    def log_ratio(self) -> Tensor:
        """lr_t = log pi_theta(y_t|.) - log pi_ref(y_t|.), [B, T]."""
        return self.logps - self.reference_logps

    def length(self) -> Tensor:
        """Scored tokens of each response [B], at least 1."""
        return self.mask.sum(-1).clamp_min(1)


_NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class Pairs(NamedTuple):
    """B rows as a method sees them."""

    chosen: Responses
    rejected: Responses | None
    """None for methods on single responses."""
    win_rate_chosen: Tensor
    """Mean probability of beating the K candidates, self counted 1/2 [B]; 1 where the data has plain labels."""
    win_rate_rejected: Tensor | None
    score_chosen: Tensor | None = None
    """The scorer's own number [B]."""
    score_rejected: Tensor | None = None
    gold: Responses | None = None
    """A third, best response; None: the chosen one."""
    anchor: Responses | None = None
    """An answer the policy sampled during training; only its logps, reference_logps and mask are read."""
    mismatched: Responses | None = None
    """Each prompt with the response of another row; as `anchor`."""
    values: Mapping[str, Tensor] = _NO_VALUES
    """What `row_values` made of the row's group, by name [B]."""
    step: Mapping[str, Tensor] = _NO_VALUES
    """Means over the whole optimizer step of what `step_values` gave, by name; scalars, constants."""


class PairLoss(NamedTuple):
    loss: Tensor
    """[B]; averaged over the rows of the optimizer step."""
    metrics: dict[str, Tensor]
    """Name -> [B], detached; averaged like the loss and logged."""
    token_loss: Tensor | None = None
    """[B]; summed and divided by the tokens that `token_count` counts over the whole optimizer step, then added."""

    def share(self, num_rows: float, num_tokens: float) -> Tensor:
        """This micro-batch's part of the step's loss. Shares of all micro-batches and ranks add up to the loss of the step at once."""
        total = self.loss.sum() / num_rows
        return total if self.token_loss is None else total + self.token_loss.sum() / max(num_tokens, 1)


class AnchorSampling(Config):
    """How the answer is sampled that a method which needs "anchor" compares with; its config holds one as `anchor`."""

    max_new_tokens: int = Field(64, ge=1)
    """Longest answer."""
    temperature: float = Field(0.8, gt=0)
    """0.5-1."""
    top_k: int = Field(50, ge=0)
    """0: off."""
    top_p: float = Field(0.95, gt=0, le=1)
    """1: off."""
    refresh: int = Field(1, ge=1)
    """Optimizer steps an answer is used for; 1: a new one at every step."""


class MethodConfig(Named):
    """Settings of a method. Choosing `name` and nothing else is the paper's method."""


class Method:
    """What every method declares; a subclass states what differs from a pair loss against a reference.

    The training loop knows these names and no method's.
    """

    VERSION: ClassVar[str]
    """Bumped when the numbers change their meaning."""
    SOURCE: ClassVar[str]
    """The equation, for `python -m stages methods`."""
    Config: ClassVar[type[MethodConfig]]
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    """Names of the table NEEDS, at the default settings."""
    SIDES: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """Responses of a row that are trained on, at the default settings."""
    PAIRING: ClassVar[str] = "best_vs_worst"
    """How its rows are made when the run does not say: a name of stages/scoring/pairing.py."""
    WEIGHTS: ClassVar[str] = "ones"
    """Weight provider when the run does not say: a name of stages/weighting/weights."""
    USES_WEIGHTS: ClassVar[bool] = True
    """False: the formula has no place for per-token weights, and any but ones must be refused."""
    REFERENCE: ClassVar[Literal["iterate", "start"]] = "iterate"
    """Who the reference is in iteration t: the policy as the iteration finds it, or the model the run started from."""
    DROP_IDENTICAL: ClassVar[bool] = True
    """A pair of equal token lists and weights carries no gradient: the weigh stage drops and counts it."""

    @classmethod
    def needs(cls, config: MethodConfig) -> frozenset[str]:
        """What these settings ask for."""
        return cls.NEEDS

    @classmethod
    def sides(cls, config: MethodConfig) -> tuple[str, ...]:
        return cls.SIDES

    @classmethod
    def drops_identical(cls, config: MethodConfig) -> bool:
        return cls.DROP_IDENTICAL

    @staticmethod
    def row_values(config: MethodConfig, scores: np.ndarray, win_rates: np.ndarray) -> dict[str, np.ndarray]:
        """Numbers for each of a prompt's K candidates, from all of their scores and win rates [K]; -> Pairs.values of their rows."""
        return {}

    @staticmethod
    def token_count(config: MethodConfig, pairs: Pairs) -> Tensor | None:
        """Tokens of each row that `token_loss` is a mean over [B]. Reads masks only: the loop counts a step before its first forward."""
        return None

    @staticmethod
    def step_values(config: MethodConfig, pairs: Pairs) -> dict[str, Tensor]:
        """Constants that are means over the whole optimizer step: name -> [B]. The loop evaluates them without gradient before the
        first `pair_loss` of the step and hands back their means over all rows and ranks as `Pairs.step`. Empty: skip that pass."""
        return {}

    @staticmethod
    def pair_loss(config: MethodConfig, pairs: Pairs) -> PairLoss:
        raise NotImplementedError


def preference_margin(
    pairs: Pairs,
    beta: float,
    coefficients: tuple[Tensor, Tensor] | None = None,
    log_ratios: tuple[Tensor, Tensor] | None = None,
    offset: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""h_b = beta (sum_t g_t lr_t(chosen) - sum_t g_t lr_t(rejected)) + offset_b: the kernel of every pairwise method, and the metrics.

    Args: coefficients: g of chosen and rejected [B, T], by default the weights; log_ratios: lr [B, T], by default against the reference;
    offset: -v + c, a KL term or a margin [B], with gradient if it has one. Returns: h [B] with gradient, metrics of [B].

    >>> from stages.models.lazy import torch
    >>> side = Responses(torch.tensor([[-1.0, -2.0, 0.0]]), torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([[True, True, False]]))
    >>> preference_margin(Pairs(side, side._replace(logps=-torch.ones(1, 3)), torch.ones(1), torch.zeros(1)), beta=0.1)[0]
    tensor([-0.1000])
    """
    rewards = []
    for number, side in enumerate((pairs.chosen, pairs.rejected)):
        g = side.weights if coefficients is None else coefficients[number]
        lr = side.log_ratio() if log_ratios is None else log_ratios[number]
        check_shapes("preference_margin", log_ratios=lr, coefficients=g, mask=side.mask)
        rewards.append(beta * masked_sum(g * lr, side.mask))
    return rewards[0] - rewards[1] + offset, pair_metrics(pairs, *rewards)


def pair_metrics(pairs: Pairs, reward_chosen: Tensor, reward_rejected: Tensor) -> dict[str, Tensor]:
    """The scalars that TRL and the DPO reference print, under the same names."""
    with torch.no_grad():
        return {
            "rewards/chosen": reward_chosen.detach(),
            "rewards/rejected": reward_rejected.detach(),
            "rewards/margins": (reward_chosen - reward_rejected).detach(),
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "logps/chosen": masked_sum(pairs.chosen.logps, pairs.chosen.mask).detach(),
            "logps/rejected": masked_sum(pairs.rejected.logps, pairs.rejected.mask).detach(),
        }


def single_metrics(pairs: Pairs, **values: Tensor) -> dict[str, Tensor]:
    """The same for rows of one response; `values` are logged beside them."""
    summed = masked_sum(pairs.chosen.logps, pairs.chosen.mask)
    return {"logps/chosen": summed.detach()} | {name: value.detach().to(summed.dtype) for name, value in values.items()}


def mean_weights(side: Responses) -> Tensor:
    """g_t = w_t / T: a sum over tokens becomes a mean (of the weighted tokens). [B, T]."""
    return side.weights / side.length().unsqueeze(-1)


def weighted_sum(values: Tensor, side: Responses) -> Tensor:
    """sum_t w_t values_t, [B]."""
    return masked_sum(side.weights * values, side.mask)


def logistic(margin: Tensor) -> Tensor:
    """l(t) = log(1 + exp(-t)) = -log sigmoid(t), without overflow at either end."""
    return -torch.nn.functional.logsigmoid(margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - t)."""
    return torch.relu(1 - margin)
