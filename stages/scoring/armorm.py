"""Stages - the `armorm` scorer: RLHFlow/ArmoRM-Llama3-8B-v0.1 without its remote code; the network is in
armorm_model.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from data_contracts.errors import ConfigError
from stages.models.lazy import import_transformers, torch
from stages.models.policy import pick_device
from stages.models.turns import turns_of_reader
from stages.scoring.base import Candidates, Scores
from stages.scoring.models import NamedModel, load_strictly, read_tensors
from stages.scoring.reward_model import Encoded, Messages, PointScorer, PointScorerConfig, chat, longest_input, padded

NO_HEADER = -3.0e38
"""What `forward` gives for a row without an assistant header; `score` makes a reason of it."""


class ArmoRM(PointScorer):
    class Config(PointScorerConfig):
        """The released model, in bfloat16."""

        name: Literal["armorm"] = "armorm"
        model: NamedModel = NamedModel(hub_id="RLHFlow/ArmoRM-Llama3-8B-v0.1")
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
        max_tokens: int | None = Field(4096, ge=16)
        """Longest input; a longer prompt loses its beginning."""
        assistant_header: tuple[int, ...] = (128009, 128006, 78191, 128007, 271)
        """Ids of `<|eot_id|><|start_header_id|>assistant<|end_header_id|>` and two line feeds: where the gate reads."""

    def load(self, directory: Path) -> None:
        from stages.scoring.armorm_model import ArmoNetwork

        settings = json.loads((directory / "config.json").read_text())
        needed = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
        if missing := [name for name in needed if name not in settings]:
            raise ConfigError(f"{directory}/config.json has no {missing}: not an ArmoRM model")
        settings = {name: value for name, value in settings.items() if name not in ("auto_map", "architectures")}
        network = ArmoNetwork(import_transformers().LlamaConfig(**settings))
        load_strictly(network, read_tensors(directory), directory)
        self.network = network.to(device=pick_device(self.device), dtype=getattr(torch, self.config.dtype)).eval()
        self.turns = turns_of_reader(directory)
        self.longest = longest_input(self.config, directory, self.turns.tokenizer.model_max_length)

    def encode(self, messages: Messages, answer: str) -> Encoded:
        ids = self.turns.conversation(chat(messages, answer))
        return Encoded(ids[-self.longest :], len(ids) > self.longest)

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [_with_reasons(scores) for scores in super().score(batch)]

    def forward(self, rows: list[list[int]]) -> list[float]:
        headers = [last_occurrence(row, self.config.assistant_header) for row in rows]
        device = next(self.network.parameters()).device
        ids, mask = padded(rows, 0, device)
        gates = torch.tensor([header or 0 for header in headers], device=device)
        points = self.network(ids, mask, gates).float().cpu().tolist()
        return [NO_HEADER if header is None else value for header, value in zip(headers, points, strict=True)]


def _with_reasons(scores: Scores) -> Scores:
    """The points with NaN, and a reason, for candidates that left no room for the assistant header."""
    points = np.asarray(scores.scores)
    absent = points == NO_HEADER
    reasons = list(scores.reasons)
    for k in np.flatnonzero(absent):
        reasons[k] = "the answer fills the reward model's context"
    return Scores.of_points(np.where(absent, math.nan, points), reasons)


def last_occurrence(ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first id of the last run equal to `pattern`; None if there is none."""
    width, target = len(pattern), list(pattern)
    starts = range(len(ids) - width, -1, -1)
    return next((start for start in starts if list(ids[start : start + width]) == target), None)
