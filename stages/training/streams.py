"""Stages - what a method needs beside the policy's log-probs, for one micro-batch: the trainer's half of base.NEEDS.

A reference or teacher model is held only for methods that need whole distributions, sampled anchors or mismatched
prompts; for all others the numbers are in the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from data_contracts.errors import ConfigError, ContractError
from stages.methods import METHODS
from stages.methods.base import AnchorSampling, Method, PairLoss, Pairs, Responses
from stages.methods.importance import max_logit, mean_logp, token_importance
from stages.models.lazy import torch
from stages.models.numerics import kl_divergence, token_logps
from stages.models.packing import Packed, packable, takes_varlen, to_device
from stages.models.policy import Batch, collate, load_causal_lm, response_logits, response_logps
from stages.training.anchors import gathered, sample_answers
from stages.training.batches import WeightedPair, collate_rows, column

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.training.config import TrainingConfig
    from stages.training.engine import Engine

LIVE_REFERENCE = frozenset({"kl_policy_reference", "kl_reference_policy", "anchor", "mismatched"})
"""Needs for which the reference model itself is in memory while training."""

IMPORTANCE = {"importance": mean_logp, "importance_max_logit": max_logit}
"""Needs for gradient attribution, and what is attributed."""

PADDED = frozenset({"kl_policy_reference", "kl_reference_policy", "policy_logits", *IMPORTANCE})
"""Needs for which the policy's logits or embeddings must lie in padded rows."""

ABSOLUTE_MARGIN = "margins/absolute"
"""Metric of every step: mean distance of chosen and rejected log-ratio, in nats."""
GROUPS = ("advantage", "log_z")
"""Needs that compare a row's candidate with the other candidates of its prompt."""


class Streams:
    """Builds `Pairs` for a method, and its loss, out of rows."""

    def __init__(self, config: TrainingConfig, engine: Engine, reference: str | None, teacher: str | None):
        self.config, self.method_config, self.engine = config, config.method, engine
        self.method = METHODS.get(config.method.name)
        self.needs, self.sides = self.method.needs(config.method), self.method.sides(config.method)
        self.reference: PreTrainedModel | None = None
        if self.needs & LIVE_REFERENCE and engine.adapter is None:
            self.reference = self._frozen(reference, "reference")
        elif self.needs & LIVE_REFERENCE and engine.adapter is not None:
            engine.adapter.hold_reference(self._given(reference, "reference"))
        self.teacher = self._frozen(teacher, "teacher") if "teacher_logits" in self.needs else None
        self.packing = config.runtime.packing and not self.needs & PADDED
        self.varlen = takes_varlen(engine.module)
        self.anchors: dict[str, list[int]] = {}
        """Sampled answers by pair_id."""
        if self.needs & {"anchor", *IMPORTANCE} and config.runtime.zero_stage == 3:
            raise ConfigError(
                f"the method {config.method.name} uses the whole model outside of DeepSpeed's forward, and ZeRO 3 cuts "
                "it over the ranks: use training.runtime.zero_stage 0-2"
            )

    def _frozen(self, directory: str | None, role: str) -> PreTrainedModel:
        """Load a model that is not trained. Raises: ConfigError if the input is missing."""
        model = load_causal_lm(self._given(directory, role), self.config.dtype, str(self.engine.torch_device)).eval()
        return model.requires_grad_(False)

    def _given(self, directory: str | None, role: str) -> str:
        if directory is None:
            raise ConfigError(
                f"the method {self.method_config.name} holds the {role} model while it trains: "
                f"give the input `{role}` to train"
            )
        return directory

    @contextmanager
    def _as_reference(self) -> Iterator[PreTrainedModel]:
        """The reference model, without gradients: a model of its own, or the policy with the reference's adapter."""
        if self.engine.adapter is None:
            with torch.no_grad():
                yield _held(self.reference)
        else:
            with self.engine.adapter.as_reference() as model:
                yield model

    def packs(self, rows: Sequence[WeightedPair]) -> bool:
        """Whether these rows make a packed batch: settings, method and model allow it, and no window hides a token."""
        longest = max(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in self.sides)
        return self.packing and packable(self.engine.module, longest)

    # -- counts that are known before the first forward of a step

    def token_count(self, rows: Sequence[WeightedPair]) -> float:
        """Return the tokens of the whole step that the method's per-token losses are means over."""
        if self.method.token_count is Method.token_count:
            return float(sum(len(row["chosen_ids"]) for row in rows))
        batch = collate(
            [[] for _ in rows] * len(self.sides), [row[f"{side}_ids"] for side in self.sides for row in rows]
        )
        pairs = self._pairs(rows, batch, torch.zeros(batch.response_ids.shape))
        return float(self.method.token_count(self.method_config, pairs).sum())

    def step_values(self, rows: Sequence[WeightedPair], partners: Sequence[WeightedPair]) -> dict[str, Tensor]:
        """Return the sums over rows of the method's step constants; without gradient."""
        if self.method.step_values is Method.step_values or not rows:
            return {}
        with torch.no_grad():
            values = self.method.step_values(self.method_config, self.pairs(rows, partners))
        return {name: value.double().sum() for name, value in values.items()}

    # -- a micro-batch

    def loss(
        self, rows: Sequence[WeightedPair], partners: Sequence[WeightedPair], step_means: dict[str, Tensor]
    ) -> PairLoss:
        """Return the method's loss of a micro-batch, not yet averaged."""
        pairs = self.pairs(rows, partners)
        constants = {name: value.to(pairs.chosen.logps) for name, value in step_means.items()}
        result = self.method.pair_loss(self.method_config, pairs._replace(step_means=constants))
        return result._replace(metrics=result.metrics | absolute_margin(pairs))

    def pairs(self, rows: Sequence[WeightedPair], partners: Sequence[WeightedPair]) -> Pairs:
        """Return everything the method needs, after one forward of the policy.

        `partners`: for each row, the row whose chosen response a mismatched pair borrows.
        """
        batch = collate_rows(rows, self.sides, self.packs(rows), self.varlen).to(self.engine.torch_device)
        extra: dict[str, Tensor] = {}
        if isinstance(batch, Packed):
            logps = response_logps(self.engine.model, batch)
        else:
            logps, extra = self._padded(batch)
        pairs = self._pairs(rows, batch, logps, extra)
        if "teacher_logits" in self.needs:
            pairs = pairs._replace(chosen=pairs.chosen._replace(**self._teacher_logits(rows)))
        if "anchor" in self.needs:
            pairs = pairs._replace(anchor=self._scored(rows, [self.anchors[row["pair_id"]] for row in rows]))
        if "mismatched" in self.needs:
            pairs = pairs._replace(mismatched=self._mismatched(rows, partners))
        return pairs

    def _padded(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's log-probs [N, T], and what methods need that takes padded rows: logits, KL or importance."""
        extra: dict[str, Tensor] = {}
        for need in self.needs & IMPORTANCE.keys():
            importance = token_importance(self.engine.module, batch, IMPORTANCE[need])
            extra["importance"], extra["importance_range"] = importance
        if not self.needs & {"kl_policy_reference", "kl_reference_policy", "policy_logits"}:
            return response_logps(self.engine.model, batch), extra
        logits = response_logits(self.engine.model, batch)
        logps = token_logps(logits, batch.response_ids, batch.response_mask)
        if "policy_logits" in self.needs:
            return logps, extra | {"logits": logits}
        with self._as_reference() as model:
            reference = response_logits(model, batch)
        p_logits, q_logits = logits, reference
        if "kl_policy_reference" not in self.needs:
            p_logits, q_logits = reference, logits
        return logps, extra | {"kl": kl_divergence(p_logits, q_logits, batch.response_mask)}

    def _pairs(
        self,
        rows: Sequence[WeightedPair],
        batch: Batch | Packed,
        logps: Tensor,
        extra: dict[str, Tensor] | None = None,
    ) -> Pairs:
        """Split log-probs and `extra` by side, and add the rows' own columns."""
        count, length = len(rows), batch.response_ids.shape[1]
        responses = []
        for number, side in enumerate(self.sides):
            part = slice(number * count, (number + 1) * count)
            columns: dict[str, Any] = {name: value[part] for name, value in (extra or {}).items()}
            for name in ("reference_logps", "old_logps", "weights"):
                values = column(rows, f"{side}_{name}", length)
                columns[name] = None if values is None else to_device(values, logps.device).to(logps.dtype)
            responses.append(Responses(logps=logps[part], mask=batch.response_mask[part], **columns))

        def numbers(name: str) -> Tensor | None:
            if rows[0][name] is None:
                return None
            return to_device(torch.tensor([row[name] for row in rows], dtype=logps.dtype), logps.device)

        pairs = Pairs(
            chosen=responses[0],
            win_rate_chosen=numbers("win_rate_chosen"),
            score_chosen=numbers("score_chosen"),
            values=self._row_values(rows, logps),
        )
        if len(responses) == 1:
            return pairs
        return pairs._replace(
            rejected=responses[1],
            win_rate_rejected=numbers("win_rate_rejected"),
            score_rejected=numbers("score_rejected"),
        )

    def _row_values(self, rows: Sequence[WeightedPair], like: Tensor) -> dict[str, Tensor]:
        """The method's numbers inside each row's group of candidates (GRPO's advantage, SPPO's log Z), by name [B]."""
        if not self.needs.intersection(GROUPS):
            return {}
        columns: dict[str, list[float]] = {}
        for row in rows:
            if row["group_scores"] is None:
                raise ConfigError(
                    f"the method {self.method_config.name} compares the candidates of a prompt, and row "
                    f"{row['pair_id']!r} has none: it needs generations and a scorer"
                )
            scores, win_rates = np.array(row["group_scores"]), np.array(row["group_win_rates"])
            for name, group in self.method.row_values(self.method_config, scores, win_rates).items():
                columns.setdefault(name, []).append(float(group[row["chosen_candidate"]]))
        return {
            name: to_device(torch.tensor(values, dtype=like.dtype), like.device) for name, values in columns.items()
        }

    def _teacher_logits(self, rows: Sequence[WeightedPair]) -> dict[str, Tensor]:
        """The teacher's logits of its own tokens of the chosen responses, and their mask."""
        batch = collate([row["teacher_prompt_ids"] for row in rows], [row["teacher_ids"] for row in rows])
        batch = batch.to(self.engine.torch_device)
        with torch.no_grad():
            logits = response_logits(_held(self.teacher), batch)
        return {"teacher_logits": logits, "teacher_mask": batch.response_mask}

    # -- other responses than the row's own

    def _mismatched(self, rows: Sequence[WeightedPair], partners: Sequence[WeightedPair]) -> Responses:
        """Each prompt with the chosen response of another row of the step."""
        with torch.no_grad():
            return self._scored(rows, [partner["chosen_ids"] for partner in partners])

    def _scored(self, rows: Sequence[WeightedPair], responses: list[list[int]]) -> Responses:
        """Responses that are not in the rows, under policy and reference."""
        batch = collate([row["prompt_ids"] for row in rows], responses).to(self.engine.torch_device)
        logps = response_logps(self.engine.model, batch)
        with self._as_reference() as model:
            reference = response_logps(model, batch)
        return Responses(logps, reference, torch.ones_like(logps), batch.response_mask)

    def sample_anchors(self, rows: Sequence[WeightedPair], step: int) -> None:
        """Sample one answer per row from the policy as it is (TI-DPO), and keep it for `anchor.refresh` steps.

        Each rank samples its share in batches, and all ranks get all answers. Seeded by step and row, so that neither
        the number of ranks nor a resumed training moves them (with refresh 1; with more, the first window after
        resuming may begin anew).
        """
        if "anchor" not in self.needs:
            return
        sampling: AnchorSampling = getattr(self.method_config, "anchor")  # noqa: B009 - NEEDS promises the field
        if step % sampling.refresh == 0:
            self.anchors = {}
        missing: dict[str, int] = {}
        for number, row in enumerate(rows):
            if row["pair_id"] not in self.anchors:
                missing.setdefault(row["pair_id"], number)
        engine = self.engine
        share = list(missing.values())[engine.rank :: engine.world_size]
        engine.module.eval()
        answers = sample_answers(
            engine.module,
            [rows[number]["prompt_ids"] for number in share],
            [hash_seed(self.config.seed, step, number) for number in share],
            sampling,
            engine.stop_ids,
            self.config.runtime.batch_tokens,
        )
        engine.module.train()
        by_pair = {rows[number]["pair_id"]: answer for number, answer in zip(share, answers, strict=True)}
        self.anchors |= gathered(by_pair, engine.world_size)


def absolute_margin(pairs: Pairs) -> dict[str, Tensor]:
    """Return |log-ratio of the chosen response - that of the rejected one| in nats, [B]; nothing without a reference.

    Where the reference is the policy itself, it is 0 at step 1 but for rounding.
    """
    if pairs.chosen.reference_logps is None:
        return {}
    margin = pairs.chosen.log_ratio().detach().float().mul(pairs.chosen.mask).sum(-1)
    if pairs.rejected is not None and pairs.rejected.reference_logps is not None:
        margin = margin - pairs.rejected.log_ratio().detach().float().mul(pairs.rejected.mask).sum(-1)
    return {ABSOLUTE_MARGIN: margin.abs()}


def _held(model: PreTrainedModel | None) -> PreTrainedModel:
    if model is None:
        raise ContractError("the loss reads a model that its NEEDS does not name")
    return model


def hash_seed(*parts: int) -> int:
    """Return a seed that depends on all parts."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
