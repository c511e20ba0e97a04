"""Stage - prompts + policy -> generations: K candidates per prompt, as token ids with the sampler's log-probs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards
from stages.job import Job
from stages.models.policy import pick_device
from stages.models.tokens import Template, context_length, encode_prompt, load_tokenizer, stop_ids, token_facts
from stages.registry import Named
from stages.running.cost import loading
from stages.sampling import SAMPLERS
from stages.sampling.base import Prompt, candidate_seeds
from stages.stage import StageRuntime


class SamplingRuntime(StageRuntime):
    prompts_per_shard: int = Field(64, ge=1)
    """How much is lost, at most, when a sampler is killed."""


class SamplingConfig(BaseConfig):
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
    """A response longer than this is cut, and then carries no EOS."""
    max_prompt_tokens: int = Field(512, ge=1)
    """A longer prompt is refused, by name, before anything is sampled."""
    template: Template = "chat"
    """chat: the model's chat template; plain: the text as it is."""
    seed: int = 0
    """Every (prompt, k) derives its own seed from this one."""
    runtime: SamplingRuntime = SamplingRuntime()

    @property
    def context_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


Config = SamplingConfig


def encode_prompts(rows: list[dict[str, Any]], config: SamplingConfig, model: str, tokenizer: Any) -> list[list[int]]:
    """Token ids of every prompt. Raises: ConfigError for a prompt that does not fit the limits or the model's context."""
    context = context_length(model)
    if context is not None and config.context_tokens > context:
        raise ConfigError(
            f"max_prompt_tokens + max_new_tokens = {config.context_tokens} exceeds the context of {context} positions of the model in {model}: lower one of them"
        )
    encoded = []
    for row in rows:
        ids = encode_prompt(tokenizer, row["messages"], config.template)
        if not 0 < len(ids) <= config.max_prompt_tokens:
            raise ConfigError(
                f"the prompt {row['prompt_id']!r} has {len(ids)} tokens, allowed are 1 to {config.max_prompt_tokens} (sampling.max_prompt_tokens; "
                f"the model's context is {context}): shorten it or raise the limit"
            )
        encoded.append(ids)
    return encoded


def run(job: Job) -> None:
    config: SamplingConfig = job.config
    model = str(job.path("policy"))
    rows = read_shards(job.path("prompts"), "prompts").to_pylist()
    tokenizer = load_tokenizer(model)
    prompts = [
        Prompt(row["prompt_id"], ids, candidate_seeds(config.seed, row["prompt_id"], config.num_candidates))
        for row, ids in zip(rows, encode_prompts(rows, config, model, tokenizer), strict=True)
    ]
    stops = stop_ids(model, tokenizer)
    device = pick_device(config.runtime.device)
    sampler = None
    for index, chunk in job.missing_shards(prompts, config.runtime.prompts_per_shard, "generations"):
        if sampler is None:
            with loading():
                sampler = SAMPLERS.get(config.backend.name)(config.backend, config, model, stops, device)
        with job.timed("generate"):
            candidates = sampler.generate(chunk)
        job.write(
            index,
            [
                row
                for prompt, group in zip(chunk, candidates, strict=True)
                for row in _rows(prompt, group, tokenizer, stops)
            ],
        )
        job.used(
            model,
            sum(len(prompt.ids) for prompt in chunk),
            sum(len(one.token_ids) for group in candidates for one in group),
        )
    if not job.is_worker:
        _summarise(job, model, tokenizer, len(prompts), device)


def _rows(prompt: Prompt, candidates: list[Any], tokenizer: Any, stops: list[int]) -> list[dict[str, Any]]:
    rows = []
    for k, candidate in enumerate(candidates):
        where = f"prompt {prompt.prompt_id} candidate {k}"
        if not 0 < len(candidate.token_ids) == len(candidate.token_logps):
            raise ContractError(
                f"{where}: {len(candidate.token_ids)} tokens and {len(candidate.token_logps)} log-probs; each needs one, and there must be one"
            )
        ended = candidate.token_ids[-1] in stops
        if (candidate.finish_reason == "stop") != ended:
            raise ContractError(
                f"{where}: finish_reason {candidate.finish_reason!r} but the last token is {candidate.token_ids[-1]} (stop ids {stops})"
            )
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "candidate": k,
                "prompt_ids": prompt.ids,
                "token_ids": candidate.token_ids,
                "token_logps": candidate.token_logps,
                "finish_reason": candidate.finish_reason,
                "seed": prompt.seeds[k],
                "completion": tokenizer.decode(
                    candidate.token_ids[:-1] if ended else candidate.token_ids, skip_special_tokens=False
                ),
            }
        )
    return rows


def _summarise(job: Job, model: str, tokenizer: Any, num_prompts: int, device: str) -> None:
    table = read_shards(job.out, "generations")
    expected = num_prompts * job.config.num_candidates
    if table.num_rows != expected:
        raise ContractError(
            f"generations {job.out.name}: {table.num_rows} rows for {num_prompts} prompts x {job.config.num_candidates} candidates"
        )
    lengths = table["token_ids"].combine_chunks().value_lengths().to_numpy()
    job.metrics |= {
        "candidates": expected,
        "tokens": int(lengths.sum()),
        "mean_tokens": float(lengths.mean()),
        "finished_rate": float((table["finish_reason"].to_numpy(zero_copy_only=False) == "stop").mean()),
    }
    job.facts |= token_facts(model, tokenizer, job.config.template) | {"device": device}
