"""Stages - what a preference method is: its settings, what it needs, and an unreduced loss over rows of responses.

Axes: B rows, T response tokens (padded anywhere; `mask` is True at scored tokens), V vocabulary. A row is a pair
(chosen, rejected); for a method on single responses it is one response, in the place of the chosen one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field

from data_contracts.config import Config
from data_contracts.errors import ContractError
from stages.models.lazy import torch
from stages.models.numerics import check_shapes, masked_sum
from stages.registry import Named, Plugin

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

NEEDS = {
    "reference": "log-probs of the response tokens under the reference -> Responses.reference_logps",
    "old_policy": "log-probs of the tokens under the policy that sampled them -> Responses.old_logps (see `opponents`)",
    "kl_policy_reference": "KL(policy || reference) of every position, full vocabulary -> Responses.kl",
    "kl_reference_policy": "KL(reference || policy) of every position, full vocabulary -> Responses.kl",
    "policy_logits": "the policy's logits of the response positions -> Responses.logits",
    "teacher_logits": "a teacher's logits of its own tokens of the response -> Responses.teacher_logits, teacher_mask",
    "importance": "gradient attribution under the current policy -> Responses.importance (importance.token_importance)",
    "importance_max_logit": "the same of the largest logit behind the last token -> Responses.importance",
    "anchor": "an answer sampled during training as config.anchor says, under policy and reference -> Pairs.anchor",
    "mismatched": "each prompt with another row's response, under policy and reference -> Pairs.mismatched",
    "win_rates": "mean preference over the K candidates -> Pairs.win_rate_chosen, win_rate_rejected",
    "scores": "scalar scores of the responses -> Pairs.score_chosen, score_rejected",
    "advantage": "the score within its prompt's group -> Pairs.values['advantage'] (row_values)",
    "log_z": "log partition over the prompt's candidates -> Pairs.values['log_z'] (row_values)",
}
"""Everything a method may ask of the stages before it and of the trainer, and where the method finds it."""

T = TypeVar("T")


def supplied(value: T | None, need: str) -> T:
    """Return `value`. Raises: ContractError if it is None: the method does not declare the need, or rows lack it."""
    if value is None:
        raise ContractError(
            f"the loss reads what the need {need!r} supplies, and it was not supplied: "
            f"put {need!r} into NEEDS of the method, or into what its `needs` returns for these settings"
        )
    return value


class Responses(NamedTuple):
    """One side of B rows. A field that the method does not need is None."""

    logps: Tensor
    """Policy log-probability of each token [B, T], in nats, with gradient; 0 outside the mask."""
    reference_logps: Tensor | None
    """The same tokens under the reference [B, T]; a constant."""
    weights: Tensor
    """Per-token weights [B, T] from the weigh stage; a constant."""
    mask: Tensor
    """Scored tokens [B, T], bool."""
    kl: Tensor | None = None
    """Full-vocabulary KL of policy and reference at each position [B, T], with gradient; numerics.kl_divergence."""
    importance: Tensor | None = None
    """Gradient attribution of each token [B, T], not normalised; a constant."""
    importance_range: Tensor | None = None
    """Smallest and largest importance over prompt and response [B, 2]; a constant."""
    old_logps: Tensor | None = None
    """The same tokens under the policy that sampled them, or the mixture of `Method.opponents` [B, T]; a constant."""
    logits: Tensor | None = None
    """Policy logits [B, T, V], with gradient."""
    teacher_logits: Tensor | None = None
    """[B, T', V']: T' = T and V' = V where teacher and policy share a tokenizer; a constant."""
    teacher_mask: Tensor | None = None
    """[B, T'] bool; None: the policy's mask."""

    @classmethod
    def unpadded(
        cls,
        logps: Sequence[Sequence[float]],
        reference_logps: Sequence[Sequence[float]] | None = None,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Responses:
        """B responses of T tokens each, all scored; weights are 1 unless given. For examples and tests."""
        policy = torch.tensor(logps)
        return cls(
            logps=policy,
            reference_logps=None if reference_logps is None else torch.tensor(reference_logps),
            weights=torch.ones_like(policy) if weights is None else torch.tensor(weights),
            mask=torch.ones_like(policy, dtype=torch.bool),
        )

    def log_ratio(self) -> Tensor:
        """lr_t = log pi_theta(y_t|.) - log pi_ref(y_t|.), [B, T]. Raises: ContractError without reference log-probs."""
        return self.logps - supplied(self.reference_logps, "reference")

    def length(self) -> Tensor:
        """Scored tokens of each response [B], at least 1."""
        return self.mask.sum(-1).clamp_min(1)


_NO_VALUES: Mapping[str, Any] = MappingProxyType({})


class Pairs(NamedTuple):
    """B rows as a method sees them."""

    chosen: Responses
    rejected: Responses | None = None
    """None for methods on single responses."""
    win_rate_chosen: Tensor | None = None
    """Mean probability of beating the K candidates, self counted 1/2 [B]; 1 where the data has plain labels."""
    win_rate_rejected: Tensor | None = None
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
    step_means: Mapping[str, Tensor] = _NO_VALUES
    """Means over the whole optimizer step of what `step_values` gave, by name; scalars, constants."""

    def both(self) -> tuple[Responses, Responses]:
        """(chosen, rejected). Raises: ContractError for rows of single responses."""
        if self.rejected is None:
            raise ContractError(
                "the loss compares two responses, and these rows have one: SIDES of the method says one"
            )
        return self.chosen, self.rejected


class PairLoss(NamedTuple):
    """The loss of B rows, not yet averaged."""

    loss: Tensor
    """[B]; averaged over the rows of the optimizer step."""
    metrics: dict[str, Tensor]
    """Name -> [B], detached; averaged like the loss and logged."""
    token_loss: Tensor | None = None
    """[B]; summed, divided by the tokens that `token_count` counts over the whole optimizer step, and added."""

    def share(self, num_rows: float, num_tokens: float) -> Tensor:
        """This micro-batch's part of the step's loss: the shares of all micro-batches and ranks add up to it."""
        total = self.loss.sum() / num_rows
        if self.token_loss is None:
            return total
        return total + self.token_loss.sum() / max(num_tokens, 1)


class AnchorSampling(Config):
    """How the trainer samples the answer for a method that needs "anchor"; the method's Config has it as `anchor`."""

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


class Method(Plugin):
    """A preference method: a loss over rows of responses. A subclass writes `Config` and `pair_loss`.

    A method is a formula and holds no model: the stages before it and the trainer compute what NEEDS names, `pair_loss`
    turns it into one number per row, and the training loop averages and differentiates that. The loop knows the names
    below and no method's own.

    All else has a default, made for a loss that compares two responses to one prompt by their log-ratios to a
    reference, each token times its weight. A method that differs says so in a class variable; where that depends on the
    settings, it overrides the hook of the same name. In every hook `config` is an instance of the subclass's own
    `Config`.

    >>> class Slack(Method):
    ...     class Config(MethodConfig):
    ...         name: Literal["slack"] = "slack"
    ...         beta: float = 1.0
    ...
    ...     @staticmethod
    ...     def pair_loss(config: Config, pairs: Pairs) -> PairLoss:
    ...         margin, metrics = preference_margin(pairs, config.beta)
    ...         return PairLoss(hinge(margin), metrics)
    >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])  # B = 1, T = 2
    >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
    >>> Slack.pair_loss(Slack.Config(), Pairs(chosen, rejected)).loss  # 1 - (0.6 + 0.1)
    tensor([0.3000])
    """

    SOURCE: ClassVar[str] = ""
    """The equation and its paper, for `selfplay methods`."""
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    """Names of the table NEEDS, at the default settings."""
    SIDES: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    """Responses of a row that are trained on, at the default settings; ("chosen",) for a method on single responses."""
    DROPS_IDENTICAL: ClassVar[bool] = True
    """Equal responses with equal weights leave no gradient: the weigh stage drops and counts such pairs."""
    PAIRING: ClassVar[str] = "best_vs_worst"
    """How its rows are made when the run does not say: a name of stages/scoring/pairing.py."""
    WEIGHTS: ClassVar[str | None] = "ones"
    """Weight provider when the run does not say: a name of stages/weighting/weights. None: the formula has no place for
    token weights, and any but ones are refused."""
    REFERENCE: ClassVar[Literal["iterate", "start"]] = "iterate"
    """The reference of iteration t when the run does not say (`reference`): the policy as the iteration finds it, or
    the model the run started from."""
    HISTORY: ClassVar[int] = 1
    """How many policies `opponents` mixes when the run does not say (`history`)."""

    @classmethod
    def needs(cls, config: Any) -> frozenset[str]:
        """Names of the table NEEDS that these settings ask for."""
        return cls.NEEDS

    @classmethod
    def sides(cls, config: Any) -> tuple[str, ...]:
        """Responses of a row that are trained on at these settings."""
        return cls.SIDES

    @classmethod
    def drops_identical(cls, config: Any) -> bool:
        """Whether the weigh stage drops pairs of equal responses; rows of single responses are never dropped."""
        return cls.DROPS_IDENTICAL and len(cls.sides(config)) == 2

    @classmethod
    def opponents(cls, config: Any, count: int) -> tuple[float, ...]:
        """lambda_j of the last `count` policies, newest first; `old_policy` supplies sum_j lambda_j log pi_(t-j).

        Unless overridden, the policy that sampled is the only one; a run's `history` above 1 is then refused.
        """
        return (1.0,)

    @staticmethod
    def row_values(config: Any, scores: np.ndarray, win_rates: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> numbers [K] of a prompt's K candidates, from their scores and win rates; they become Pairs.values."""
        return {}

    @staticmethod
    def token_count(config: Any, pairs: Pairs) -> Tensor:
        """Tokens of each row [B] that `token_loss` is a mean over; the chosen response's unless overridden.

        Reads masks only: the loop counts a step before its first forward.
        """
        return pairs.chosen.mask.sum(-1)

    @staticmethod
    def step_values(config: Any, pairs: Pairs) -> dict[str, Tensor]:
        """Name -> [B], for numbers that the loss takes as constant means over the whole optimizer step (KTO's drift).

        The loop evaluates them without gradient before the first `pair_loss` of the step, and hands back their means
        over all rows and ranks as `Pairs.step_means`. Where no method overrides this, there is no such pass.
        """
        return {}

    @staticmethod
    def pair_loss(config: Any, pairs: Pairs) -> PairLoss:
        """The loss and metrics of B rows, unreduced."""
        raise NotImplementedError("a method defines pair_loss(config, pairs)")


def preference_margin(
    pairs: Pairs,
    beta: float,
    coefficients: tuple[Tensor, Tensor] | None = None,
    log_ratios: tuple[Tensor, Tensor] | None = None,
    offset: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""h_b = beta (sum_t g_t lr_t(chosen) - sum_t g_t lr_t(rejected)) + offset_b: the kernel of every pairwise method.

    Args: coefficients: g of chosen and rejected [B, T], by default the weights; log_ratios: lr [B, T], by default
    against the reference; offset: -v + c, a KL term or a margin [B], with gradient if it has one. Returns: h [B] with
    gradient, and the metrics, each [B].

    >>> chosen = Responses.unpadded([[-1.0, -0.5]], reference_logps=[[-1.2, -0.9]])
    >>> rejected = Responses.unpadded([[-2.0]], reference_logps=[[-1.9]])
    >>> preference_margin(Pairs(chosen, rejected), beta=0.1)[0]  # 0.1 (0.6 + 0.1)
    tensor([0.0700])
    """
    rewards: list[Tensor] = []
    for number, side in enumerate(pairs.both()):
        g = side.weights if coefficients is None else coefficients[number]
        lr = side.log_ratio() if log_ratios is None else log_ratios[number]
        check_shapes("preference_margin", log_ratios=lr, coefficients=g, mask=side.mask)
        rewards.append(beta * masked_sum(g * lr, side.mask))
    return rewards[0] - rewards[1] + offset, pair_metrics(pairs, *rewards)


def pair_metrics(pairs: Pairs, reward_chosen: Tensor, reward_rejected: Tensor) -> dict[str, Tensor]:
    """The metrics [B] that TRL and the DPO reference print, by the same names, from both sides' rewards [B]."""
    chosen, rejected = pairs.both()
    with torch.no_grad():
        return {
            "rewards/chosen": reward_chosen.detach(),
            "rewards/rejected": reward_rejected.detach(),
            "rewards/margins": (reward_chosen - reward_rejected).detach(),
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "logps/chosen": masked_sum(chosen.logps, chosen.mask).detach(),
            "logps/rejected": masked_sum(rejected.logps, rejected.mask).detach(),
        }


def single_metrics(pairs: Pairs, **values: Tensor) -> dict[str, Tensor]:
    """The summed log-prob [B] of rows of one response, and beside it the `values` [B] by name."""
    summed = masked_sum(pairs.chosen.logps, pairs.chosen.mask)
    return {"logps/chosen": summed.detach()} | {name: value.detach().to(summed.dtype) for name, value in values.items()}


def mean_weights(side: Responses) -> Tensor:
    """g_t = w_t / T, [B, T]: with these coefficients a sum over tokens becomes a mean of the weighted tokens."""
    return side.weights / side.length().unsqueeze(-1)


def weighted_sum(values: Tensor, side: Responses) -> Tensor:
    """sum_t w_t values_t over the scored tokens, [B, T] -> [B]."""
    return masked_sum(side.weights * values, side.mask)


def logistic(margin: Tensor) -> Tensor:
    """l(t) = log(1 + exp(-t)) = -log sigmoid(t), without overflow at either end."""
    return -torch.nn.functional.logsigmoid(margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - t)."""
    return torch.relu(1 - margin)
