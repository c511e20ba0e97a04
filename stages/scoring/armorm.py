"""Stages - the `armorm` scorer: RLHFlow/ArmoRM-Llama3-8B-v0.1 without its remote code; the network is in armorm_model.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_contracts.errors import ConfigError
from stages.models.lazy import torch
from stages.models.policy import pick_device
from stages.scoring.base import Candidates, Scores
from stages.scoring.models import ModelScorerConfig, NamedModel, load_strictly, local_directory, read_tensors
from stages.scoring.reward_model import PointwiseScorer, padded


def last_occurrence(ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first id of the last run equal to `pattern`."""
    width = len(pattern)
    return next(
        (start for start in range(len(ids) - width, -1, -1) if list(ids[start : start + width]) == list(pattern)), None
    )


class ArmoRM(PointwiseScorer):
    class Config(ModelScorerConfig):
        """The released model, in bfloat16."""

        name: Literal["armorm"] = "armorm"
        model: NamedModel = NamedModel(hub_id="RLHFlow/ArmoRM-Llama3-8B-v0.1")
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        max_tokens: int | None = Field(4096, ge=16)
        """Longest input; a longer prompt loses its beginning."""
        assistant_header: tuple[int, ...] = (128009, 128006, 78191, 128007, 271)
        """Ids of `<|eot_id|><|start_header_id|>assistant<|end_header_id|>` and two line feeds: where the gate reads."""

    @staticmethod
    def check_prompts(config: Config, prompts: Sequence[dict[str, Any]]) -> None:
        local_directory(config.model, config.name)

    def open(self, directory: Path) -> None:
        from transformers import AutoTokenizer, LlamaConfig

        from stages.scoring.armorm_model import ArmoNetwork

        settings = json.loads((directory / "config.json").read_text())
        needed = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
        if missing := [name for name in needed if name not in settings]:
            raise ConfigError(f"{directory}/config.json has no {missing}: not an ArmoRM model")
        network = ArmoNetwork(
            LlamaConfig(**{key: value for key, value in settings.items() if key not in ("auto_map", "architectures")})
        )
        load_strictly(network, read_tensors(directory), directory)
        self.network = network.to(device=pick_device(self.device), dtype=getattr(torch, self.config.dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        self.longest = self.limit(directory, self.tokenizer.model_max_length)

    def encode(self, messages: Sequence[dict[str, str]], answer: str) -> list[int]:
        chat = [
            *({"role": m["role"], "content": m["content"]} for m in messages),
            {"role": "assistant", "content": answer},
        ]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)[-self.longest :]

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        scores = super().score(batch)
        for item in scores:
            for k, value in enumerate(item.scores):
                if value == self.NO_HEADER:
                    item.scores[k], item.reasons[k] = float("nan"), "the answer fills the reward model's context"
        return scores

    NO_HEADER = -3.0e38
    """Stands for a row without an assistant header until `score` says so."""

    def forward(self, rows: list[list[int]]) -> list[float]:
        gates = [last_occurrence(row, self.config.assistant_header) for row in rows]
        device = next(self.network.parameters()).device
        ids, mask = padded(rows, 0, device)
        places = torch.tensor([gate or 0 for gate in gates], device=device)
        values = self.network(ids, mask, places).float().cpu().tolist()
        return [self.NO_HEADER if gate is None else value for gate, value in zip(gates, values, strict=True)]
