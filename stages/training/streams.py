"""Stages - what a method needs beside the policy's log-probs, made for one micro-batch: the trainer's half of methods.base.NEEDS.

A reference or teacher model is held only for methods that need whole distributions, sampled anchors or mismatched prompts; for all others
the numbers are in the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_contracts.errors import ConfigError
from stages.methods import METHODS
from stages.methods.base import Method, PairLoss, Pairs, Responses
from stages.methods.importance import token_importance
from stages.models.lazy import torch
from stages.models.numerics import kl_divergence, token_logps
from stages.models.policy import Batch, Packed, collate, load_causal_lm, packable, response_logits, response_logps
from stages.training.batches import collate_rows, column

LIVE_REFERENCE = frozenset({"kl_policy_reference", "kl_reference_policy", "anchor", "mismatched"})
"""Needs for which the reference model itself must be in memory while training."""

PADDED = frozenset({"kl_policy_reference", "kl_reference_policy", "policy_logits", "importance"})
"""Needs for which the policy's logits or embeddings must lie in padded rows."""

Rows = list[dict[str, Any]]


class Streams:
    """Builds `Pairs` for a method, and its loss, out of rows."""

    def __init__(self, config: Any, engine: Any, reference: str | None, teacher: str | None):
        self.config, self.method_config, self.engine = config, config.method, engine
        self.method = METHODS.get(config.method.name)
        self.needs, self.sides = self.method.needs(config.method), self.method.sides(config.method)
        self.reference = self._frozen(reference, "reference") if self.needs & LIVE_REFERENCE else None
        self.teacher = self._frozen(teacher, "teacher") if "teacher_logits" in self.needs else None
        self.packed = config.runtime.packing and not self.needs & PADDED and packable(engine.module)
        self.anchors: dict[str, list[int]] = {}
        if self.needs & {"importance", "anchor"} and config.runtime.zero_stage == 3:
            raise ConfigError(
                f"the method {config.method.name} uses the whole model outside of DeepSpeed's forward, and ZeRO 3 cuts it over the ranks: use training.runtime.zero_stage 0-2"
            )

    def _frozen(self, directory: str | None, role: str) -> Any:
        if directory is None:
            raise ConfigError(
                f"the method {self.method_config.name} holds the {role} model while it trains: give the input `{role}` to train"
            )
        model = load_causal_lm(directory, self.config.dtype, str(self.engine.torch_device)).eval()
        return model.requires_grad_(False)

    # -- counts that are known before the first forward of a step ------------------------------------------------------------------

    def token_count(self, rows: Rows) -> float:
        """Tokens of the whole step that the method's per-token losses are means over."""
        if self.method.token_count is Method.token_count:
            return float(sum(len(row["chosen_ids"]) for row in rows))
        batch = collate_rows(rows, self.sides, self.packed)
        counts = self.method.token_count(
            self.method_config, self._pairs(rows, batch, torch.zeros(batch.response_ids.shape))
        )
        return float(counts.sum())

    def step_values(self, rows: Rows, partners: Rows) -> dict[str, float]:
        """Sums over rows of the method's step constants; without gradient."""
        if self.method.step_values is Method.step_values or not rows:
            return {}
        with torch.no_grad():
            values = self.method.step_values(self.method_config, self.pairs(rows, partners)[0])
        return {name: float(value.double().sum()) for name, value in values.items()}

    # -- a micro-batch -------------------------------------------------------------------------------------------------------------

    def loss(self, rows: Rows, partners: Rows, step: dict[str, float]) -> tuple[PairLoss, Batch | Packed]:
        pairs, batch = self.pairs(rows, partners)
        constants = {
            name: torch.tensor(value, dtype=pairs.chosen.logps.dtype, device=pairs.chosen.logps.device)
            for name, value in step.items()
        }
        return self.method.pair_loss(self.method_config, pairs._replace(step_means=constants)), batch

    def pairs(self, rows: Rows, partners: Rows) -> tuple[Pairs, Batch | Packed]:
        """One forward of the policy, and everything the method wants beside it. `partners`: the row whose response each one borrows."""
        batch = collate_rows(rows, self.sides, self.packed).to(self.engine.torch_device)
        model = self.engine.model
        extra: dict[str, Any] = {}
        if "importance" in self.needs:
            extra["importance"], extra["importance_range"] = token_importance(self.engine.module, batch)
        if self.needs & {"kl_policy_reference", "kl_reference_policy", "policy_logits"}:
            logits = response_logits(model, batch)
            logps = token_logps(logits, batch.response_ids, batch.response_mask)
            extra |= self._distributions(batch, logits)
        else:
            logps = response_logps(model, batch)
        pairs = self._pairs(rows, batch, logps, extra)
        if "teacher_logits" in self.needs:
            pairs = pairs._replace(chosen=pairs.chosen._replace(**self._teacher(rows)))
        if "anchor" in self.needs:
            pairs = pairs._replace(anchor=self._scored(rows, [self.anchors[row["pair_id"]] for row in rows]))
        if "mismatched" in self.needs:
            pairs = pairs._replace(mismatched=self._mismatched(rows, partners))
        return pairs, batch

    def _distributions(self, batch: Batch, logits: Any) -> dict[str, Any]:
        if "policy_logits" in self.needs:
            return {"logits": logits}
        with torch.no_grad():
            other = response_logits(self.reference, batch)
        left, right = (logits, other) if "kl_policy_reference" in self.needs else (other, logits)
        return {"kl": kl_divergence(left, right, batch.response_mask)}

    def _pairs(self, rows: Rows, batch: Batch | Packed, logps: Any, extra: dict[str, Any] | None = None) -> Pairs:
        count, length = len(rows), batch.response_ids.shape[1]
        responses = []
        for number, side in enumerate(self.sides):
            part = slice(number * count, (number + 1) * count)
            columns = {
                name: column(rows, f"{side}_{name}", length) for name in ("reference_logps", "old_logps", "weights")
            }
            columns = {name: None if value is None else value.to(logps) for name, value in columns.items()}
            responses.append(
                Responses(
                    logps=logps[part],
                    mask=batch.response_mask[part],
                    **columns,
                    **{name: value[part] for name, value in (extra or {}).items()},
                )
            )

        def numbers(name: str) -> Any:
            return (
                None
                if rows[0][name] is None
                else torch.tensor([row[name] for row in rows], dtype=logps.dtype, device=logps.device)
            )

        single = len(responses) == 1
        return Pairs(
            chosen=responses[0],
            rejected=None if single else responses[1],
            win_rate_chosen=numbers("win_rate_chosen"),
            win_rate_rejected=None if single else numbers("win_rate_rejected"),
            score_chosen=numbers("score_chosen"),
            score_rejected=None if single else numbers("score_rejected"),
            values=self._row_values(rows, logps),
        )

    def _row_values(self, rows: Rows, like: Any) -> dict[str, Any]:
        """The method's numbers inside each row's group of candidates (GRPO's advantage, SPPO's log Z)."""
        if not self.needs & {"advantage", "log_z"}:
            return {}
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["group_scores"] is None:
                raise ConfigError(
                    f"the method {self.method_config.name} compares the candidates of a prompt, and row {row['pair_id']!r} has none: it needs generations and a scorer"
                )
            values = self.method.row_values(
                self.method_config, np.array(row["group_scores"]), np.array(row["group_win_rates"])
            )
            for name, group in values.items():
                found.setdefault(name, []).append(float(group[row["chosen_candidate"]]))
        return {name: torch.tensor(values, dtype=like.dtype, device=like.device) for name, values in found.items()}

    def _teacher(self, rows: Rows) -> dict[str, Any]:
        """The teacher's logits of its own tokens of the chosen responses."""
        batch = collate([row["teacher_prompt_ids"] for row in rows], [row["teacher_ids"] for row in rows]).to(
            self.engine.torch_device
        )
        with torch.no_grad():
            return {"teacher_logits": response_logits(self.teacher, batch), "teacher_mask": batch.response_mask}

    # -- other responses than the row's own ----------------------------------------------------------------------------------------

    def _mismatched(self, rows: Rows, partners: Rows) -> Responses:
        """Each prompt with the chosen response of another row of the step."""
        with torch.no_grad():
            return self._scored(rows, [partner["chosen_ids"] for partner in partners])

    def _scored(self, rows: Rows, responses: list[list[int]]) -> Responses:
        """Responses that are not in the rows, under policy and reference."""
        batch = collate([row["prompt_ids"] for row in rows], responses).to(self.engine.torch_device)
        logps = response_logps(self.engine.model, batch)
        with torch.no_grad():
            reference = response_logps(self.reference, batch)
        return Responses(logps, reference, torch.ones_like(logps), batch.response_mask)

    def sample_anchors(self, rows: Rows, step: int) -> None:
        """TI-DPO's intermediate answers, one per row, sampled from the policy as it is; kept for `anchor.refresh` steps.

        Seeded by step and row, so that a resumed training samples the same ones (with refresh 1; else a window may begin anew).
        """
        if "anchor" not in self.needs:
            return
        anchor = self.method_config.anchor
        if step % anchor.refresh == 0:
            self.anchors = {}
        module = self.engine.module
        stops = self.engine.stop_ids
        module.eval()
        for number, row in enumerate(rows):
            if row["pair_id"] in self.anchors:
                continue
            torch.manual_seed(hash_seed(self.config.seed, step, number))
            ids = torch.tensor([row["prompt_ids"]], device=self.engine.torch_device)
            output = module.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=anchor.temperature, top_k=anchor.top_k,
                top_p=anchor.top_p, max_new_tokens=anchor.max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], use_cache=True,
            )  # fmt: skip
            self.anchors[row["pair_id"]] = output[0, ids.shape[1] :].tolist()
        module.train()


def hash_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
