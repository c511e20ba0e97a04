"""Test oracle: the scorer `llm_blender` asks llm-blender 0.0.2 itself, one pair at a time, to check the native `pairrm`
against.

It needs transformers 4, so it runs in the environment that setup.sh makes. tests/stages/scoring/test_score_stage.py
registers it as any package outside of this one would: by an entry point in the group selfplay.scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import llm_blender
import numpy as np

from stages.models.policy import pick_device
from stages.scoring.base import Candidates, Scores, prompt_text
from stages.scoring.models import ModelScorer, ModelScorerConfig, locate


class LLMBlender(ModelScorer):
    TEXT_ONLY = True

    class Config(ModelScorerConfig):
        name: Literal["llm_blender"] = "llm_blender"

    def __init__(self, config: Config, device: str):
        super().__init__(config, device)
        self.blender: Any = None

    @classmethod
    def compares(cls, config: Config) -> bool:
        return True

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.blender is None:
            self.blender = llm_blender.Blender()
            directory = locate(self.config.model, self.config.name)
            self.blender.loadranker(str(directory), device=pick_device(self.device), fp16=False)
        return [self._score(item) for item in batch]

    def _score(self, item: Candidates) -> Scores:
        source, texts = prompt_text(item.prompt["messages"]), [row["completion"] for row in item.generations]
        logits = np.zeros((len(texts), len(texts)))
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                if i != j:
                    answer = self.blender.compare(
                        [source], [first], [second], batch_size=1, return_logits=True, mode="[A,B]", disable_tqdm=True
                    )
                    logits[i, j] = float(np.asarray(answer).ravel()[0])
                    self.services.compared(1)
        return Scores.of_comparisons(logits)
