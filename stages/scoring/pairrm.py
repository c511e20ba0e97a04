"""Stages - the `pairrm` scorer: every ordered pair of a prompt's candidates, compared by PairRM; raw logits, both orders.

Deviations from llm-blender 0.0.2, whose logits it gives (docs/scoring.md has the figures): (1) a candidate's share of the tokens follows
from its own prompt, as with batch_size=1, so the batch changes nothing; (2) a text that spells out a marker or control token is
blanked there; (3) a lone pair of identical texts is never compared: it is a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stages.models.policy import batches_by_budget, pick_device, pin_threads
from stages.scoring.base import Candidates, Scores, Surroundings, prompt_text
from stages.scoring.models import ModelScorerConfig, NamedModel, PairScorer, locate

CPU_TOKENS, CPU_CELLS = 1024, 2**17
"""Of a batch on a CPU: what its cache holds. A long row by itself is the fastest; of short ones, enough to hide the calls, and no more:
larger batches hold more padding."""


class PairRM(PairScorer):
    TEXT_ONLY = True

    class Config(ModelScorerConfig):
        """llm-blender/PairRM-hf in float32."""

        name: Literal["pairrm"] = "pairrm"
        model: NamedModel = NamedModel(hub_id="llm-blender/PairRM-hf")
        """A checkpoint of `llm-blender/PairRM` or `llm-blender/PairRM-hf`, or one of the same layout."""
        tokenizer: NamedModel | None = None
        """Where the tokenizer lies, if not beside the weights: microsoft/deberta-v3-large for `llm-blender/PairRM`."""

    def __init__(self, config: Config, device: str):
        self.config, self.device, self.batch_tokens = config, device, 4096
        self.ranker: Any = None
        self.compared: Any = lambda count: None
        self.used: Any = lambda model, tokens_in: None
        self.directory: Path | str = ""

    def prepare(self, surroundings: Surroundings) -> None:
        self.batch_tokens, self.compared, self.used = (
            surroundings.batch_tokens,
            surroundings.compared,
            surroundings.used,
        )

    def load(self) -> Any:
        if self.ranker is None:
            from stages.scoring.pairrm_model import load_ranker

            pin_threads(None)
            config = self.config
            self.directory = directory = locate(config.model, config.name)
            tokenizer = None if config.tokenizer is None else _tokenizer_directory(config.tokenizer)
            self.ranker = load_ranker(directory, tokenizer, config.dtype, pick_device(self.device))
        return self.ranker

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        if pick_device(self.device) == "cpu":
            return batches_by_budget(lengths, min(self.batch_tokens, CPU_TOKENS), CPU_CELLS)
        return batches_by_budget(lengths, self.batch_tokens)

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        ranker = self.load()
        matrices = [np.zeros((len(item.generations), len(item.generations))) for item in batch]
        pairs, places = [], []
        for number, item in enumerate(batch):
            source = ranker.tokenizer.source(prompt_text(item.prompt))
            texts = [ranker.tokenizer.candidate(row["completion"], len(source)) for row in item.generations]
            for i, first in enumerate(texts):
                for j, second in enumerate(texts):
                    if i != j:
                        pairs.append((source, first, second))
                        places.append((number, i, j))
        lengths = [sum(map(len, pair)) for pair in pairs]
        for rows in self.batches(lengths):
            for row, logit in zip(rows, ranker.logits([pairs[row] for row in rows]), strict=True):
                number, i, j = places[row]
                matrices[number][i, j] = logit
            self.compared(len(rows))
        self.used(self.directory, sum(lengths))
        return [Scores(None, matrix, [""] * len(matrix)) for matrix in matrices]


def _tokenizer_directory(model: NamedModel) -> Any:
    return Path(model.path).expanduser() if model.path is not None else locate(model, "pairrm")
