"""Stages - the `transformers` sampler: for models that vLLM does not serve, and to check vLLM. Slower (2-4x, CPU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.config import Runtime
from data_contracts.errors import ContractError
from stages.models.lazy import torch
from stages.models.policy import load_causal_lm
from stages.registry import Named
from stages.sampling.base import Candidate, Prompt, Sampler


class TransformersRuntime(Runtime):
    batch_size: int = Field(32, ge=1)
    """Sequences decoded at once."""


class Transformers(Sampler):
    class Config(Named):
        name: Literal["transformers"] = "transformers"
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
        """Arithmetic of the sampler."""
        runtime: TransformersRuntime = TransformersRuntime()

    def __init__(
        self,
        config: Config,
        sampling: Any,
        model: str,
        stop_ids: list[int],
        device: str,
        blank_ids: Sequence[int] = (),
    ):
        super().__init__(config, sampling, model, stop_ids, device, blank_ids)
        self.model = load_causal_lm(model, config.dtype, device).eval()

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        rows = [(prompt.ids, seed) for prompt in prompts for seed in prompt.seeds]
        candidates: list[Candidate] = []
        size = self.config.runtime.batch_size
        for start in range(0, len(rows), size):
            candidates += self._decode(rows[start : start + size])
        result = iter(candidates)
        return [[next(result) for _ in prompt.seeds] for prompt in prompts]

    def _decode(self, rows: list[tuple[list[int], int]]) -> list[Candidate]:
        """Sample token by token with a generator per row, so a candidate depends on its own seed alone."""
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(rows):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        ids, mask = ids.to(device), mask.to(device)
        generators = [np.random.default_rng(seed) for _, seed in rows]
        tokens: list[list[int]] = [[] for _ in rows]
        logps: list[list[float]] = [[] for _ in rows]
        ended = np.zeros(len(rows), dtype=bool)
        cache, step_ids, positions = None, ids, (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.inference_mode():
            for _ in range(self.sampling.max_new_tokens):
                output = self.model(
                    input_ids=step_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                scores = output.logits[:, -1].float().log_softmax(-1).cpu()
                if not torch.isfinite(scores.max(-1).values).all():
                    raise ContractError(
                        "the policy's log-probs are NaN or infinite: its weights are damaged (diverged training?)"
                    )
                allowed = scores.index_fill(1, torch.tensor(self.blank_ids), -torch.inf) if self.blank_ids else scores
                drawn = _draw(allowed, generators, self.sampling.temperature, self.sampling.top_p, self.sampling.top_k)
                for row, token in enumerate(drawn):
                    if not ended[row]:
                        tokens[row].append(token)
                        logps[row].append(float(scores[row, token]))
                        ended[row] = token in self.stop_ids
                if ended.all():
                    break
                step_ids = torch.tensor(drawn, device=device)[:, None]
                mask = torch.cat([mask, torch.ones_like(step_ids)], dim=1)
                positions = positions[:, -1:] + 1
        return [Candidate(tokens[row], logps[row], "stop" if ended[row] else "length") for row in range(len(rows))]


def _draw(logps: Any, generators: list[Any], temperature: float, top_p: float, top_k: int = 0) -> list[int]:
    """One token per row; temperature 0 is greedy. Nucleus: of the top_k, the smallest set whose mass reaches top_p."""
    if temperature == 0:
        return logps.argmax(-1).tolist()
    probabilities = (logps / temperature).softmax(-1).double()
    if top_k:
        probabilities, order = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    else:
        probabilities, order = probabilities.sort(-1, descending=True)
    mass = probabilities.cumsum(-1)
    if top_p < 1:
        probabilities = torch.where(mass - probabilities < top_p, probabilities, 0.0)
        mass = probabilities.cumsum(-1)
    points = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64) * mass[:, -1:]
    picked = torch.searchsorted(mass, points, right=True).clamp_max(mass.shape[1] - 1)
    return order.gather(-1, picked).squeeze(-1).tolist()
