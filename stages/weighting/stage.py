"""Stage - scored_pairs + models -> weighted_pairs: reference log-probs and a weight for every token, one pair per row.

What the trainer needs is all in the row, so it loads one model and asks nothing. First every model makes its pass, one model in memory at a
time, into the log-prob store; then the rows are put together, shard by shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import ShardRows, read_shards, shard_path, to_table, write_shard
from stages.job import Job
from stages.models.logps import Pass
from stages.registry import Named
from stages.running.history import events
from stages.stage import StageRuntime
from stages.weighting.teacher import TeacherView
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens, add_stats

SIDES = ("chosen", "rejected")
Pairs = list[dict[str, Any]]


class WeightingRuntime(StageRuntime):
    pairs_per_shard: int = Field(256, ge=1)
    """How much is lost, at most, when the stage is killed."""
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward."""


class WeightingConfig(BaseConfig):
    """Per-token reference log-probs and per-token weights."""

    weights: Annotated[Named, WEIGHTS] | None = None
    """Weight provider, e.g. {name: swift}. None: the method's own (ones for most)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes; the trainer's, or policy and reference differ before the first step."""
    reference: bool = True
    """Make the reference pass. Set for you from the method, as are the next four."""
    old_policy: bool = False
    """Also the pass of the policy that sampled the responses (GRPO)."""
    teacher_tokens: bool = False
    """Also the responses as the teacher's tokenizer cuts them (KD, ULD)."""
    drop_identical: bool = True
    """Drop pairs whose two responses and weights are equal: they carry no gradient."""
    swap: bool = False
    """Exchange chosen and rejected: how TIS-DPO makes its negative model."""
    positive_system: str | None = None
    """TIS-DPO (P): score the responses under this system prompt for pi+."""
    negative_system: str | None = None
    """TIS-DPO (P): and under this one for pi-."""
    runtime: WeightingRuntime = WeightingRuntime()


Config = WeightingConfig


def run(job: Job) -> None:
    config: WeightingConfig = job.config
    settings = config.weights or WEIGHTS.config("ones")
    provider = WEIGHTS.get(settings.name)
    pairs = ShardRows([job.path("pairs")], "scored_pairs")
    if empty := [pair["pair_id"] for pair in pairs if not pair["rejected_ids" if config.swap else "chosen_ids"]]:
        raise ContractError(f"scored_pairs {job.inputs['pairs'].key}: no token in chosen_ids of {empty[:3]}")
    sources = _Sources(job, provider.needs(settings), pairs)
    size = config.runtime.pairs_per_shard
    with job.timed("passes"):
        sources.fill(pairs, size)
    for index, chunk in job.missing_shards(pairs, size, "weighted_pairs", beside=("dropped",)):
        rows, dropped = [], []
        chunk = _sided(chunk, config.swap)
        weights, stats = sources.weights(chunk, provider, settings)
        for row in sources.rows(chunk, weights):
            identical = row["chosen_ids"] == row["rejected_ids"] and np.array_equal(
                row["chosen_weights"], row["rejected_weights"]
            )
            (dropped if identical and config.drop_identical else rows).append(row)
        job.event("stats", index=index, stats=stats)
        reasons = [{"prompt_id": row["prompt_id"], "reason": "chosen and rejected are the same"} for row in dropped]
        write_shard(shard_path(job.out, index, "dropped"), to_table(reasons, "dropped"))
        job.write(index, rows)
    if not job.is_worker:
        _summarise(job, settings, sources)


def _sided(pairs: Pairs, swap: bool) -> Pairs:
    return [_swapped(pair) for pair in pairs] if swap else pairs


def _swapped(pair: dict[str, Any]) -> dict[str, Any]:
    other = {"chosen": "rejected", "rejected": "chosen"}
    row = dict(pair)
    for side in SIDES:
        for name in (f"{side}_ids", side, f"score_{side}", f"{side}_candidate"):
            row[name] = pair[name.replace(side, other[side])]
    return row  # win rates stay with the label: the new chosen one is now preferred


class _Sources:
    """Everything that goes into the rows: the models' passes over the responses, by role."""

    def __init__(self, job: Job, needs: frozenset[str], pairs: Pairs):
        self.job, self.needs, config = job, needs, job.config
        self.passes: dict[str, tuple[Pass, str | None]] = {}
        self.teacher: TeacherView | None = None
        if config.reference:
            self._add("reference_logps", "reference")
        if config.old_policy:
            self._add("old_logps", "policy")
        if "reference" in needs:
            # The weights compare with the policy as the iteration finds it; the loss may keep the start model as its reference.
            self._add("reference", "policy" if "policy" in job.inputs else "reference")
        for role in ("positive", "negative", "reward_model"):
            if role in needs:
                self._add(role, role, system=getattr(config, f"{role}_system", None))
        if "importance" in needs:
            from stages.weighting.importance import score_importance

            self._add(
                "importance",
                "policy" if "policy" in job.inputs else "reference",
                kind="importance",
                score=score_importance,
            )
        scored = bool(needs & {"teacher", "teacher_unshifted"})
        if scored or config.teacher_tokens:
            self.teacher = TeacherView(job, scored, unshifted="teacher_unshifted" in needs)

    def _add(self, role: str, source: str, kind: str = "logps", system: str | None = None, **options: Any) -> None:
        if source not in self.job.inputs:
            raise ConfigError(
                f"the weights need the model `{source}`: give it as an input of weigh, or as `{source}` of the run"
            )
        check_same_tokenizer(self.job, source)
        runtime = self.job.config.runtime
        root = self.job.store_root
        self.passes[role] = (
            Pass(
                root,
                self.job.inputs[source],
                self.job.config.dtype,
                runtime.device,
                runtime.batch_tokens,
                kind,
                **options,
            ),
            system,
        )

    def fill(self, pairs: Sequence[dict[str, Any]], size: int) -> None:
        """Every model's pass over `size` pairs at a time, one model in memory at a time."""
        starts = range(0, len(pairs), size)

        def at(start: int) -> Pairs:
            return _sided(pairs[start : start + size], self.job.config.swap)

        scored = self.teacher is not None and self.teacher.scored
        total = len(starts) * (len(self.passes) + scored)
        done = 0
        everyone = [
            (role, one, lambda rows, system=system: self._responses(rows, system))
            for role, (one, system) in self.passes.items()
        ]
        if scored:
            everyone.append(("teacher", self.teacher.scores, self.teacher.responses))
        for role, one, responses in everyone:
            for number, start in self.job.share(
                role, starts, lambda start, one=one, responses=responses: one.has(*responses(at(start)))
            ):
                rows = at(start)
                if one.fill(*responses(rows)):
                    self.job.event("pass", role=role, index=number)
                one.account(self.job)
                done += 1
                self.job.progress(done, total, "passes")
            one.release()

    def _responses(self, rows: Pairs, system: str | None = None) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses of both sides, chosen first; a side without a response is left out."""
        sides = [(row, side) for side in SIDES for row in rows if row[f"{side}_ids"]]
        prompts = [row["prompt_ids"] if system is None else self._under(system, row) for row, _ in sides]
        return prompts, [row[f"{side}_ids"] for row, side in sides]

    def _under(self, system: str, row: dict[str, Any]) -> list[int]:
        if not hasattr(self, "_system_prompts"):
            from stages.weighting.teacher import SystemPrompts

            self._system_prompts = SystemPrompts(self.job)
        return self._system_prompts.encode(row["prompt_id"], system)

    def weights(self, rows: Pairs, provider: Any, settings: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
        """One array per response, in the order of `_responses`, and the provider's statistics."""
        _, responses = self._responses(rows)
        sides = [(row, side) for side in SIDES for row in rows if row[f"{side}_ids"]]
        columns = {
            role: one.get(*self._responses(rows, system))
            for role, (one, system) in self.passes.items()
            if role in self.needs
        }
        view = self.teacher.batch(rows) if self.teacher is not None else {}
        ended = view.pop("ended", [False] * len(responses))
        batch = ResponseBatch(
            keys=[f"{row['pair_id']}/{side}" for row, side in sides],
            chosen=np.array([side == "chosen" for _, side in sides]),
            student=view.pop("student", None) or Tokens.of(responses, None, ended),
            logps={role: np.concatenate(values) if values else np.zeros(0) for role, values in columns.items()},
            **view,
        )
        result = provider.weights(settings, batch)
        return result.per_response(batch.student), result.stats

    def rows(self, rows: Pairs, weights: list[np.ndarray]) -> Pairs:
        """ShardRows of weighted_pairs."""
        prompts, responses = self._responses(rows)
        columns: dict[str, list[Any]] = {"weights": weights}
        for role in ("reference_logps", "old_logps"):
            columns[role] = (
                self.passes[role][0].get(prompts, responses) if role in self.passes else [None] * len(responses)
            )
        streams = {name: iter(values) for name, values in columns.items()}
        out = [{name: row[name] for name in KEPT} | {"teacher_prompt_ids": None, "teacher_ids": None} for row in rows]
        for side in SIDES:
            for row in out:
                present = bool(row[f"{side}_ids"])
                for name, stream in streams.items():
                    empty = None if name != "weights" and columns[name] and columns[name][0] is None else []
                    row[f"{side}_{name}"] = next(stream) if present else empty
        if self.teacher is not None and self.job.config.teacher_tokens:
            for row, (prompt, response) in zip(out, self.teacher.chosen(rows), strict=True):
                row["teacher_prompt_ids"], row["teacher_ids"] = prompt, response
        return out


KEPT = (
    "pair_id",
    "prompt_id",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "win_rate_chosen",
    "win_rate_rejected",
    "score_chosen",
    "score_rejected",
)
KEPT += ("chosen_candidate", "rejected_candidate", "group_scores", "group_win_rates")


def check_same_tokenizer(job: Job, source: str) -> None:
    """Token-level comparison needs equal tokens. Raises: ConfigError."""
    from stages.models.tokens import tokenizer_digest

    base = "reference" if "reference" in job.inputs else "policy"
    if base in job.inputs and tokenizer_digest(job.path(source)) != tokenizer_digest(job.path(base)):
        raise ConfigError(
            f"the model `{source}` ({job.path(source)}) has another tokenizer than `{base}` ({job.path(base)}): its log-probs are of other tokens. Only the "
            "teacher of SWIFT may have one of its own"
        )


def _summarise(job: Job, settings: Any, sources: _Sources) -> None:
    table = read_shards(job.out, "weighted_pairs")
    dropped = read_shards(job.out, "dropped", "dropped")
    if not table.num_rows:
        raise ContractError(
            f"weighted_pairs {job.out.name}: all {dropped.num_rows} pairs have equal responses, e.g. of the prompts "
            f"{dropped['prompt_id'].to_pylist()[:3]}: nothing to train on. A higher sampling.temperature gives more varied ones"
        )
    job.metrics |= {"pairs": table.num_rows, "dropped": dropped.num_rows}
    for side in SIDES:
        weights = table[f"{side}_weights"].combine_chunks().flatten().to_numpy()
        job.metrics[f"tokens/{side}"] = len(weights)
        if len(weights):
            job.metrics |= {
                f"weights/{side}/mean": float(weights.mean()),
                f"weights/{side}/min": float(weights.min()),
                f"weights/{side}/max": float(weights.max()),
            }
        logps = table[f"{side}_reference_logps"].combine_chunks().flatten().to_numpy()
        if len(logps):
            job.metrics[f"mean_reference_logp/{side}"] = float(logps.mean())
    stats = {event["index"]: event["stats"] for event in events(job.out) if event["event"] == "stats"}
    job.metrics |= {f"weights/{name}": value for name, value in add_stats(stats.values()).items()}
    passes = {role: one for role, (one, _) in sources.passes.items()} | (
        {"teacher": sources.teacher.scores} if sources.teacher else {}
    )
    for role, one in passes.items():
        job.metrics |= {f"logps/{role}/hits": one.hits, f"logps/{role}/misses": one.misses}
    job.facts |= {"weights": settings.name, "weights_version": WEIGHTS.get(settings.name).VERSION}
