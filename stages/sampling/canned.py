"""Stages - the `canned` sampler: hashes instead of a model. It stands in for vLLM in tests of everything around it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from stages.registry import Named
from stages.sampling.base import Candidate, Prompt, Sampler


class Canned(Sampler):
    class Config(Named):
        """Every candidate is a few ids drawn from a hash of its seed."""

        name: Literal["canned"] = "canned"
        vocabulary: int = Field(256, gt=1)
        """Ids are drawn below this."""

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        return [[self._candidate(seed) for seed in prompt.seeds] for prompt in prompts]

    def _candidate(self, seed: int) -> Candidate:
        digest = hashlib.sha256(str(seed).encode()).digest()
        length = 1 + digest[0] % self.sampling.max_new_tokens
        # A stop id belongs where a response ended, and nowhere else.
        never = {*self.stop_ids, *self.blank_ids}
        letters = [token for token in range(self.config.vocabulary) if token not in never]
        ids = [letters[digest[1 + i % 31] % len(letters)] for i in range(length)]
        finished = length < self.sampling.max_new_tokens and bool(self.stop_ids)
        if finished:
            ids[-1] = self.stop_ids[0]
        return Candidate(ids, [-math.log(self.config.vocabulary)] * length, "stop" if finished else "length")
