"""Stage - prompts + policy -> generations: K candidates per prompt, as token ids with the sampler's log-probs."""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, overload

import pyarrow.compute as pc
from pydantic import Field

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import name_of
from data_contracts.shard_rows import ShardRows
from data_contracts.shards import read_shard, shard_paths
from stages.job import Job, Shard
from stages.models.families import attention_addition
from stages.models.lazy import import_auto_classes
from stages.models.policy import pick_device
from stages.models.tokens import context_length
from stages.models.turn_settings import TurnConfig, ending_of
from stages.models.turns import Turns, unusable
from stages.registry import Named
from stages.running.cost import loading
from stages.sampling import SAMPLERS
from stages.sampling.base import Candidate, Prompt, Sampler, candidate_seeds
from stages.stage import StageRuntime


class SamplingRuntime(StageRuntime):
    prompts_per_shard: int = Field(64, ge=1)
    """What a sampler writes at once; when it is killed, it loses the shards that it works on."""


class SamplingConfig(TurnConfig):
    """K candidates of the policy for each prompt. Vetted: K = 5, temperature 1, top_p 1 (SPPO's paper)."""

    NEUTRAL: ClassVar[dict[str, Any]] = TurnConfig.NEUTRAL | {"top_k": 0}

    backend: Annotated[Named, SAMPLERS] = Field(default_factory=lambda: SAMPLERS.config("vllm"), validate_default=True)
    """vllm, transformers, or canned (tests)."""
    num_candidates: int = Field(5, ge=1, le=1024)
    """K: responses per prompt."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus: sample from the smallest set of tokens with this much mass (of what top_k leaves)."""
    top_k: int = Field(0, ge=0)
    """Sample from this many most likely tokens; 0 from all. On a CPU vLLM sorts the vocabulary for top_p, not for top_k."""
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
    """Return what enters the key for some models only: their attention, and a terminator that sampling once ignored.

    Before the turn contract, a model did not stop where its template ends a turn, unless generation_config.json listed
    that token. `attention_addition` says for which models the attention counts.
    """
    if "policy" not in inputs:
        return {}
    additions: dict[str, Any] = {}
    if config.backend.name == "transformers":
        additions |= attention_addition(inputs.values())
    ending = ending_of(inputs["policy"].path, config)
    if ending.token is not None and not ending.is_listed:
        additions["terminator"] = ending.token
    return additions


class UsablePrompts(Sequence[Prompt]):
    """The prompts of an artifact that can be used, as token ids that are made on access: 8 bytes a prompt."""

    def __init__(self, rows: ShardRows, config: SamplingConfig, turns: Turns):
        """Check every prompt.

        Raises: ConfigError, naming the row, for a prompt that does not fit the limits or the model's context, that the
        template refuses, or that spells a control token where the settings refuse that.
        """
        check_context(config, turns)
        self.rows, self.config, self.turns = rows, config, turns
        self.dropped: Counter[str] = Counter()
        """How many prompts are dropped for which reason."""
        self._numbers = array("q")
        """Of the usable rows."""
        for number, row in enumerate(rows):
            if reason := unusable(row, config, turns):
                self.dropped[reason] += 1
            else:
                self._encoded(row)
                self._numbers.append(number)

    def _encoded(self, row: Mapping[str, Any]) -> list[int]:
        try:
            ids = self.turns.prompt(row["messages"])
        except ConfigError as error:
            raise ConfigError(f"the prompt {name_of(row)}: {error}") from None
        limit = self.config.max_prompt_tokens
        if not 0 < len(ids) <= limit:
            raise ConfigError(
                f"the prompt {name_of(row)} has {len(ids)} tokens, allowed are 1 to {limit} "
                f"(sampling.max_prompt_tokens; the model's context is {context_length(self.turns.directory)}): "
                "shorten it or raise the limit"
            )
        return ids

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._prompt(row) for row in self.rows.pick(self._numbers[index])]
        return self._prompt(self.rows[self._numbers[index]])

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        seeds = candidate_seeds(self.config.seed, row["prompt_id"], self.config.num_candidates)
        return Prompt(row["prompt_id"], self._encoded(row), seeds)


def check_context(config: SamplingConfig, turns: Turns) -> None:
    """Raises: ConfigError for limits that the model's context cannot hold."""
    context = context_length(turns.directory)
    if context is not None and config.context_tokens > context:
        raise ConfigError(
            f"max_prompt_tokens + max_new_tokens = {config.context_tokens} exceeds the context of {context} positions "
            f"of the model in {turns.directory}: lower one of them"
        )


def preload(config: SamplingConfig) -> None:
    """Import what `run` will; once for many stages, before any is forked (stages/forkserver.py)."""
    import_auto_classes()
    SAMPLERS.get(config.backend.name).preload(pick_device(config.runtime.device))


def run(job: Job) -> None:
    config: SamplingConfig = job.config
    model = str(job.path("policy"))
    turns = Turns(model, config)
    prompts = UsablePrompts(ShardRows([job.path("prompts")], "prompts"), config, turns)
    if not prompts:
        raise ContractError(f"generations {job.out.name}: every prompt is dropped: {dict(prompts.dropped)}")
    device = pick_device(config.runtime.device)
    shards = job.shards_ahead(prompts, config.runtime.prompts_per_shard, "generations")
    first = next((shard for shard in shards if shard is not None), None)
    if first is not None:
        with loading():
            sampler_class = SAMPLERS.get(config.backend.name)
            sampler = sampler_class(config.backend, config, model, turns.stop_ids, device, turns.blank_ids)
        _write_shards(job, sampler, chain([first], shards), turns)
    if not job.is_worker:
        _summarise(job, turns, len(prompts), prompts.dropped, device)


def _write_shards(job: Job, sampler: Sampler, shards: Iterator[Shard | None], turns: Turns) -> None:
    """Write the shards in their order, as the sampler completes them; it may work on several at once."""
    being_made: deque[Shard | None] = deque()
    seconds_claiming = 0.0

    def read() -> Iterator[Sequence[Prompt]]:
        nonlocal seconds_claiming
        while True:
            began = time.monotonic()
            try:
                shard = next(shards)
            except StopIteration:
                return
            finally:
                seconds_claiming += time.monotonic() - began
            being_made.append(shard)
            yield [] if shard is None else shard.items

    results = sampler.generate_all(read())
    while True:
        began, claiming_before = time.monotonic(), seconds_claiming
        candidates = next(results, None)
        seconds = time.monotonic() - began - (seconds_claiming - claiming_before)
        if candidates is None:
            return
        job.event("seconds", what="generate", seconds=seconds)
        if (shard := being_made.popleft()) is None:
            continue
        groups = zip(shard.items, candidates, strict=True)
        job.write(shard.number, [row for prompt, group in groups for row in candidate_rows(prompt, group, turns)])
        job.used(
            job.path("policy"),
            sum(len(prompt.ids) for prompt in shard.items),
            sum(len(candidate.token_ids) for group in candidates for candidate in group),
        )
        shard.finish()


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
        first = early[0]
        return (
            f"the stop id {ids[first]} stands at position {first} of {len(ids)}: "
            "the sampler went on after the turn's end"
        )
    if unknown := [token for token in ids if token not in turns.known_ids]:
        return f"no token of the tokenizer has the id {unknown[0]}: the sampler drew from the embedding's padding"
    return None


def _summarise(job: Job, turns: Turns, num_prompts: int, dropped: Mapping[str, int], device: str) -> None:
    """Metrics of the whole artifact, shard by shard. Raises: ContractError if rows are missing."""
    rows = tokens = finished = 0
    for path in shard_paths(job.out, "generations"):
        table = read_shard(path, "generations")
        rows += table.num_rows
        tokens += int(pc.list_value_length(table["token_ids"]).to_numpy().sum())
        finished += int((table["finish_reason"].to_numpy(zero_copy_only=False) == "stop").sum())
    expected = num_prompts * job.config.num_candidates
    if rows != expected:
        raise ContractError(
            f"generations {job.out.name}: {rows} rows for {num_prompts} prompts x {job.config.num_candidates} "
            "candidates"
        )
    job.metrics |= {
        "candidates": expected,
        "tokens": tokens,
        "mean_tokens": tokens / expected,
        "finished_rate": finished / expected,
    }
    job.metrics |= {f"dropped/{reason}": count for reason, count in dropped.items()}
    job.facts |= turns.facts() | {"device": device}
