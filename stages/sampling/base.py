"""Stages - what a sampler is. One call: prompts in as token ids, candidates out as token ids with the sampler's own log-probs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from stages.registry import Named

SEED_SPACE = 2**62


class Prompt(NamedTuple):
    prompt_id: str
    ids: list[int]
    seeds: list[int]
    """One per candidate."""


class Candidate(NamedTuple):
    token_ids: list[int]
    """With the EOS that ended it, if one did."""
    token_logps: list[float]
    """log pi(token), before temperature and top_p; nats."""
    finish_reason: str
    """"stop": it ended by itself; "length": it was cut."""


class Sampler(Protocol):
    Config: type[Named]

    def __init__(self, config: Any, sampling: Any, model: str, stop_ids: list[int], device: str): ...

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        """Candidates of each prompt, in order. Equal prompt, seed and settings give an equal candidate."""


def candidate_seeds(seed: int, prompt_id: str, count: int) -> list[int]:
    """A seed for each candidate of a prompt: independent of the other prompts, of their order and of sharding."""
    first = (
        int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:8], "big")
        % (SEED_SPACE // 1024)
        * 1024
    )
    return [first + k for k in range(count)]
