"""Stages - the `pairrm` scorer: PairRM compares every ordered pair of a prompt's candidates; raw logits, both orders.

The logits are those of llm-blender 0.0.2 (docs/scoring.md has the figures), with three deviations: (1) the tokens left
to a candidate follow from its own prompt, as with batch_size=1, so the batch changes nothing; (2) a text that spells
out a marker or control token is blanked there; (3) identical completions are never compared: they tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from data_contracts.checkpoint import model_content
from stages.models.hub import model_directory
from stages.models.policy import batches_by_budget, pick_device, pin_threads
from stages.models.templates import read_json
from stages.scoring.base import Candidates, Scores, prompt_text
from stages.scoring.models import ModelScorer, ModelScorerConfig, NamedModel, locate

if TYPE_CHECKING:
    from stages.scoring.pairrm_model import PairRanker

CPU_TOKENS, CPU_CELLS = 1024, 2**17
"""Limits of a batch on a CPU: what its cache holds. A long row by itself is the fastest; short ones run together to
hide the cost of the calls, and no more of them, since larger batches hold more padding."""


class Pair(NamedTuple):
    """One comparison: texts as token ids, and where its logit belongs."""

    source: list[int]
    first: list[int]
    second: list[int]
    item: int
    """Number of the prompt in the batch."""
    i: int
    j: int

    @property
    def length(self) -> int:
        return len(self.source) + len(self.first) + len(self.second)


class PairRM(ModelScorer):
    TEXT_ONLY = True
    ON_GPU = "float16"  # llm-blender's own choice; its logits are eight times nearer to float32's than bfloat16's

    class Config(ModelScorerConfig):
        """llm-blender/PairRM-hf."""

        name: Literal["pairrm"] = "pairrm"
        model: NamedModel = NamedModel(hub_id="llm-blender/PairRM-hf")
        """A checkpoint of `llm-blender/PairRM` or `llm-blender/PairRM-hf`, or one of the same layout."""
        tokenizer: NamedModel | None = None
        """Where the tokenizer lies, if not beside the weights: microsoft/deberta-v3-large for `llm-blender/PairRM`."""

        def identity(self) -> dict[str, Any]:
            """The settings, with the content of a directory that the checkpoint's config.json names."""
            path = None if self.model.path is None else Path(self.model.path).expanduser() / "config.json"
            backbone = None if path is None else read_json(path).get("model_name")
            if not isinstance(backbone, str) or not Path(backbone).is_dir():
                return super().identity()
            return super().identity() | {"backbone": model_content(Path(backbone))}

    def __init__(self, config: Config, device: str):
        super().__init__(config, device)
        self.ranker: PairRanker | None = None
        self.directory: Path | None = None
        """The model's, once it is loaded."""

    @classmethod
    def compares(cls, config: Config) -> bool:
        return True

    def load(self) -> PairRanker:
        """The network with its tokenizer; loaded at the first call."""
        if self.ranker is None:
            from stages.scoring.pairrm_model import load_ranker

            pin_threads(None)
            config = self.config
            self.directory = locate(config.model, config.name)
            tokenizer = None if config.tokenizer is None else model_directory(config.tokenizer)
            self.ranker = load_ranker(self.directory, tokenizer, self.arithmetic(), pick_device(self.device))
        return self.ranker

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        ranker = self.load()
        matrices = [np.zeros((len(item.generations), len(item.generations))) for item in batch]
        pairs = [pair for number, item in enumerate(batch) for pair in self._pairs(ranker, number, item)]
        for numbers in self._batches([pair.length for pair in pairs]):
            compared = [pairs[number] for number in numbers]
            logits = ranker.logits([(pair.source, pair.first, pair.second) for pair in compared])
            for pair, logit in zip(compared, logits, strict=True):
                matrices[pair.item][pair.i, pair.j] = logit
            self.services.compared(len(compared))
        self.services.used(self.directory, sum(pair.length for pair in pairs))
        return [Scores.of_comparisons(matrix) for matrix in matrices]

    def _pairs(self, ranker: PairRanker, number: int, item: Candidates) -> Iterator[Pair]:
        """Every ordered pair of a prompt's candidates."""
        source = ranker.tokenizer.source(prompt_text(item.prompt["messages"]))
        texts = [ranker.tokenizer.candidate(row["completion"], len(source)) for row in item.generations]
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                if i != j:
                    yield Pair(source, first, second, number, i, j)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of the rows of each forward."""
        budget = self.tokens_per_forward()
        if pick_device(self.device) == "cpu":
            return batches_by_budget(lengths, min(budget, CPU_TOKENS), CPU_CELLS)
        return batches_by_budget(lengths, budget)
