"""Stage - prompts + policy -> generations: K candidates per prompt, as token ids with the sampler's log-probs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import pyarrow.compute as pc
from pydantic import Field

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards
from stages.job import Job
from stages.models.families import attention_addition
from stages.models.policy import pick_device
from stages.models.tokens import context_length
from stages.models.turns import TurnConfig, Turns, ending_of, unusable
from stages.registry import Named
from stages.running.cost import loading
from stages.sampling import SAMPLERS
from stages.sampling.base import Candidate, Prompt, candidate_seeds
from stages.stage import StageRuntime


class SamplingRuntime(StageRuntime):
    prompts_per_shard: int = Field(64, ge=1)
    """How much is lost, at most, when a sampler is killed."""


class SamplingConfig(TurnConfig):
    """K candidates of the policy for each prompt. Vetted: K = 5, temperature 1, top_p 1 (SPPO's paper)."""

    backend: Annotated[Named, SAMPLERS] = Field(default_factory=lambda: SAMPLERS.config("vllm"), validate_default=True)
    """vllm, transformers, or canned (tests)."""
    num_candidates: int = Field(5, ge=1, le=1024)
    """K: responses per prompt."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: sample from the smallest set of tokens with this much mass."""
    max_new_tokens: int = Field(512, ge=1)
    """A response longer than this is cut, and then carries no terminator."""
    max_prompt_tokens: int = Field(512, ge=1)
    """A longer prompt is refused, by name, before anything is sampled."""
    seed: int = 0
    """Every (prompt, k) derives its own seed from this one."""
    runtime: SamplingRuntime = SamplingRuntime()

    @property
    def context_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


Config = SamplingConfig


def key_additions(config: SamplingConfig, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """Before the turn contract, a model was not stopped where its own template ends a turn, unless its files listed
    that token; and see `attention_addition`.
    """
    if "policy" not in inputs:
        return {}
    attention = attention_addition(inputs.values()) if config.backend.name == "transformers" else {}
    ending = ending_of(inputs["policy"].path, config)
    return attention | ({} if ending.token is None or ending.is_listed else {"terminator": ending.token})


class Encoded(NamedTuple):
    """The prompts of some rows as token ids, in their order; what is dropped is in neither of the first two."""

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    dropped: dict[str, str]
    """prompt_id -> reason."""


def encode_prompts(rows: list[dict[str, Any]], config: SamplingConfig, turns: Turns) -> Encoded:
    """Token ids of every prompt that can be used.

    Raises: ConfigError, naming the row, for a prompt that does not fit the limits or the model's context, that the
    template refuses, or that spells a control token where the settings refuse that.
    """
    context = context_length(turns.directory)
    if context is not None and config.context_tokens > context:
        raise ConfigError(
            f"max_prompt_tokens + max_new_tokens = {config.context_tokens} exceeds the context of {context} positions of the model in "
            f"{turns.directory}: lower one of them"
        )
    usable, encoded, dropped = [], [], {}
    for row in rows:
        if reason := unusable(row, config, turns):
            dropped[row["prompt_id"]] = reason
            continue
        try:
            ids = turns.prompt(row["messages"])
        except ConfigError as error:
            raise ConfigError(f"the prompt {row['prompt_id']!r}: {error}") from None
        if not 0 < len(ids) <= config.max_prompt_tokens:
            raise ConfigError(
                f"the prompt {row['prompt_id']!r} has {len(ids)} tokens, allowed are 1 to {config.max_prompt_tokens} (sampling.max_prompt_tokens; "
                f"the model's context is {context}): shorten it or raise the limit"
            )
        usable.append(row)
        encoded.append(ids)
    return Encoded(usable, encoded, dropped)


def run(job: Job) -> None:
    config: SamplingConfig = job.config
    model = str(job.path("policy"))
    turns = Turns(model, config)
    encoded = encode_prompts(read_shards(job.path("prompts"), "prompts").to_pylist(), config, turns)
    prompts = [
        Prompt(row["prompt_id"], ids, candidate_seeds(config.seed, row["prompt_id"], config.num_candidates))
        for row, ids in zip(encoded.rows, encoded.ids, strict=True)
    ]
    if not prompts:
        raise ContractError(f"generations {job.out.name}: every prompt is dropped: {list(encoded.dropped.items())[:3]}")
    device = pick_device(config.runtime.device)
    sampler = None
    for index, chunk in job.missing_shards(prompts, config.runtime.prompts_per_shard, "generations"):
        if sampler is None:
            with loading():
                sampler_class = SAMPLERS.get(config.backend.name)
                sampler = sampler_class(config.backend, config, model, turns.stop_ids, device, turns.blank_ids)
        with job.timed("generate"):
            candidates = sampler.generate(chunk)
        job.write(
            index,
            [
                row
                for prompt, group in zip(chunk, candidates, strict=True)
                for row in candidate_rows(prompt, group, turns)
            ],
        )
        job.used(
            model,
            sum(len(prompt.ids) for prompt in chunk),
            sum(len(candidate.token_ids) for group in candidates for candidate in group),
        )
    if not job.is_worker:
        _summarise(job, turns, len(prompts), encoded.dropped, device)


def candidate_rows(prompt: Prompt, candidates: list[Candidate], turns: Turns) -> list[dict[str, Any]]:
    """Rows of `generations`. Raises: ContractError for a candidate that a sampler may not return."""
    rows = []
    for k, candidate in enumerate(candidates):
        if problem := _problem(candidate, turns):
            raise ContractError(f"prompt {prompt.prompt_id} candidate {k}: {problem}")
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "candidate": k,
                "prompt_ids": prompt.ids,
                "token_ids": candidate.token_ids,
                "token_logps": candidate.token_logps,
                "finish_reason": candidate.finish_reason,
                "seed": prompt.seeds[k],
                "completion": turns.read(candidate.token_ids),
            }
        )
    return rows


def _problem(candidate: Candidate, turns: Turns) -> str | None:
    """Why a sampler may not return this candidate; None if it may."""
    ids = candidate.token_ids
    if not 0 < len(ids) == len(candidate.token_logps):
        return f"{len(ids)} tokens and {len(candidate.token_logps)} log-probs; each needs one, and there must be one"
    if (candidate.finish_reason == "stop") != turns.ended(ids):
        return f"finish_reason {candidate.finish_reason!r} but the last token is {ids[-1]} (stop ids {turns.stop_ids})"
    early = [position for position, token in enumerate(ids[:-1]) if token in turns.stop_ids]
    if early:
        return f"the stop id {ids[early[0]]} stands at position {early[0]} of {len(ids)}: the sampler went on after the turn's end"
    if unknown := [token for token in ids if token not in turns.known_ids]:
        return f"no token of the tokenizer has the id {unknown[0]}: the sampler drew from the embedding's padding"
    return None


def _summarise(job: Job, turns: Turns, num_prompts: int, dropped: dict[str, str], device: str) -> None:
    table = read_shards(job.out, "generations")
    expected = num_prompts * job.config.num_candidates
    if table.num_rows != expected:
        raise ContractError(
            f"generations {job.out.name}: {table.num_rows} rows for {num_prompts} prompts x {job.config.num_candidates} candidates"
        )
    lengths = pc.list_value_length(table["token_ids"]).to_numpy()
    job.metrics |= {
        "candidates": expected,
        "tokens": int(lengths.sum()),
        "mean_tokens": float(lengths.mean()),
        "finished_rate": float((table["finish_reason"].to_numpy(zero_copy_only=False) == "stop").mean()),
    }
    job.metrics |= {f"dropped/{reason}": count for reason, count in Counter(dropped.values()).items()}
    job.facts |= turns.facts() | {"device": device}
