"""Stages - the `teacher_logp` scorer: how likely a stronger model finds a completion. Its passes are kept in the
log-prob store: each is paid once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_contracts.checkpoint import external_model
from data_contracts.rows import GenerationRow
from stages.models.logps import Pass
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns, turns_of_reader, with_room_for_system
from stages.scoring.base import Candidates, Scores, by_prompt
from stages.scoring.models import DEFAULT_TOKENS, ModelScorer, ModelScorerConfig, locate


class Teacher(NamedTuple):
    """The loaded teacher."""

    logps: Pass
    turns: Turns


class TeacherLogp(ModelScorer):
    TASK = "causal"

    class Config(ModelScorerConfig):
        """Mean log-prob per token, in bfloat16."""

        name: Literal["teacher_logp"] = "teacher_logp"
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        normalise: bool = True
        """Per token; False: the sum, which prefers short completions."""
        template: Literal["chat", "plain"] | None = None
        """How the teacher reads prompts; None: by its chat template if it has one."""

    def __init__(self, config: Config, device: str):
        super().__init__(config, device)
        self.teacher: Teacher | None = None

    def _load(self) -> Teacher:
        directory = locate(self.config.model, self.config.name)
        root = self.services.store_root
        if root is None:  # outside of a stage there is no store to keep the passes in
            self.scratch = tempfile.TemporaryDirectory()
            root = Path(self.scratch.name)
        model = external_model(directory, root / "digests")
        logps = Pass(root, model, self.config.dtype, self.device, self.services.batch_tokens or DEFAULT_TOKENS)
        if self.config.template is None:
            return Teacher(logps, turns_of_reader(directory))
        return Teacher(logps, with_room_for_system(Turns(directory, TurnConfig(template=self.config.template))))

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.teacher is None:
            self.teacher = self._load()
        logps, turns = self.teacher
        prompts, responses = [], []
        for item in batch:
            prompt = turns.prompt(item.prompt["messages"])
            prompts += [prompt] * len(item.generations)
            responses += [_response(turns, row) for row in item.generations]
        full = [number for number, response in enumerate(responses) if response]
        prompts, answers = [prompts[number] for number in full], [responses[number] for number in full]
        logps.fill(prompts, answers)
        logps.account(self.services)
        rows: dict[int, np.ndarray] = dict(zip(full, logps.get(prompts, answers), strict=True))
        points = [self._points(rows.get(number)) for number in range(len(responses))]
        return [
            Scores.of_points([value for value, _ in part], [reason for _, reason in part])
            for part in by_prompt(points, batch)
        ]

    def _points(self, logps: np.ndarray | None) -> tuple[float, str]:
        """The score of one completion from its tokens' log-probs, or NaN and the reason."""
        if logps is None:
            return float("nan"), "empty completion"
        if np.isnan(logps).any():
            return float("nan"), "longer than the teacher's context"
        logps = logps.astype(np.float64)
        return float(logps.mean() if self.config.normalise else logps.sum()), ""

    def metrics(self) -> dict[str, float]:
        """Passes computed (misses) and found in the store (hits) since the start."""
        if self.teacher is None:
            return {}
        return {"teacher/misses": self.teacher.logps.misses, "teacher/hits": self.teacher.logps.hits}


def _response(turns: Turns, row: GenerationRow) -> list[int]:
    """A completion as the teacher's tokens, with its terminator if the completion ended by itself."""
    if row["finish_reason"] == "stop":
        return turns.response(row["completion"])
    return turns.text.encode(row["completion"])
