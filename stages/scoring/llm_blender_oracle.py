"""Stages - the `llm_blender` scorer: llm-blender 0.0.2 itself, to check the native `pairrm` against. Same contract, one pair at a time.

It needs transformers 4, so it runs in an environment of its own: deploy/setup/oracle.sh makes one, `scoring.runtime.python` names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from data_contracts.errors import ConfigError
from stages.models.policy import pick_device
from stages.scoring.base import Candidates, Scores, Surroundings, prompt_text
from stages.scoring.models import ModelScorerConfig, NamedModel, PairScorer, locate


class LLMBlender(PairScorer):
    TEXT_ONLY = True

    class Config(ModelScorerConfig):
        name: Literal["llm_blender"] = "llm_blender"
        model: NamedModel = NamedModel(hub_id="llm-blender/PairRM")
        """Layout of `llm-blender/PairRM`; its config.json names the backbone that llm-blender loads first."""
        dtype: Literal["float32"] = "float32"

    def __init__(self, config: Config, device: str):
        self.config, self.device = config, device
        self.blender: Any = None
        self.compared: Any = lambda count: None

    def prepare(self, surroundings: Surroundings) -> None:
        self.compared = surroundings.compared

    def _load(self) -> Any:
        if self.blender is None:
            try:
                import llm_blender
            except ImportError as error:
                raise ConfigError(
                    f"llm_blender does not load here ({error}). Make its environment with deploy/setup/oracle.sh and set "
                    "scoring.runtime.python: .venv-oracle/bin/python; or use {name: pairrm}, which gives the same logits"
                ) from None
            self.blender = llm_blender.Blender()
            self.blender.loadranker(
                str(locate(self.config.model, self.config.name)), device=pick_device(self.device), fp16=False
            )
        return self.blender

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [self._score(item) for item in batch]

    def _score(self, item: Candidates) -> Scores:
        blender, source = self._load(), prompt_text(item.prompt)
        texts = [row["completion"] for row in item.generations]
        logits, reasons = np.zeros((len(texts), len(texts))), [""] * len(texts)
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                if i != j:
                    try:
                        found = blender.compare(
                            [source],
                            [first],
                            [second],
                            batch_size=1,
                            return_logits=True,
                            mode="[A,B]",
                            disable_tqdm=True,
                        )
                        logits[i, j] = float(np.asarray(found).ravel()[0])
                    except RuntimeError:  # a marker inside a text: tensors of different sizes
                        logits[i, j] = np.nan
                        reasons[i] = "llm-blender cannot read a marker inside a text"
                    self.compared(1)
        return Scores(None, logits, reasons)
