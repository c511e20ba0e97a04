"""Stages - what a sampler is: a class with one compulsory method, `generate`. Prompts go in as token ids, candidates
come out as token ids with the sampler's own log-probs.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from stages.registry import Plugin

SEED_SPACE = 2**62
"""Seeds are below this: an engine may keep them in 64 bits with a sign."""


class Prompt(NamedTuple):
    """A prompt to answer once for each seed."""

    prompt_id: str
    ids: list[int]
    seeds: list[int]
    """One per candidate."""


class Candidate(NamedTuple):
    """One sampled response."""

    token_ids: list[int]
    """With the stop id that ended it, if one did."""
    token_logps: list[float]
    """log pi(token), before temperature, top_p and top_k; nats."""
    finish_reason: str
    """"stop": it ended by itself; "length": it was cut."""


class Sampler(Plugin, ABC):
    """A way to draw responses from a model. A subclass writes `Config` and `generate`.

    The stage makes one if a shard is missing. An engine that takes requests while it works overrides `generate_all`.
    """

    def __init__(
        self,
        config: Any,
        sampling: Any,
        model: str,
        stop_ids: list[int],
        device: str,
        blank_ids: Sequence[int] = (),
    ):
        """`config`: an instance of the subclass's own `Config`; `sampling`: temperature, top_p, top_k, max_new_tokens and
        context_tokens; `model`: a directory; `stop_ids`: ids that end a response; `device`: cpu or cuda; `blank_ids`:
        ids that the model has logits for and the tokenizer no token, never to be drawn."""
        self.config, self.sampling, self.directory, self.stop_ids, self.device = (
            config,
            sampling,
            model,
            stop_ids,
            device,
        )
        self.blank_ids = list(blank_ids)

    @classmethod
    def preload(cls, device: str) -> None:
        """Import the engine's library; once for many stages, before any is forked."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        """Return the candidates of each prompt, one per seed.

        Equal prompt, seed and settings give an equal candidate.
        """

    def generate_all(self, shards: Iterable[Sequence[Prompt]]) -> Iterator[list[list[Candidate]]]:
        """Yield the candidates of each shard's prompts, in the order of the shards; here one shard at a time.

        Shards may be read ahead, but for an empty one: it asks to yield all before it first.
        """
        for prompts in shards:
            yield self.generate(prompts) if prompts else []


def candidate_seeds(seed: int, prompt_id: str, count: int) -> list[int]:
    """A seed for each candidate of a prompt: independent of the other prompts, of their order and of sharding."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()
    first = int.from_bytes(digest[:8], "big") % (SEED_SPACE // 1024) * 1024
    return [first + k for k in range(count)]
