"""Stages - the `teacher_logp` scorer: how likely a stronger model finds a completion; its pass lies in the log-prob store and is paid once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_contracts.checkpoint import external_model, has_chat_template
from stages.models.logps import Pass
from stages.models.tokens import encode_prompt, load_tokenizer
from stages.scoring.base import Candidates, Scores, Surroundings
from stages.scoring.models import ModelScorer, ModelScorerConfig, locate


class TeacherLogp(ModelScorer):
    class Config(ModelScorerConfig):
        """Mean log-prob per token, in bfloat16."""

        name: Literal["teacher_logp"] = "teacher_logp"
        dtype: Literal["float32", "bfloat16"] = "bfloat16"
        normalise: bool = True
        """Per token; False: the sum, which prefers short completions."""
        template: Literal["chat", "plain"] | None = None
        """How the teacher reads prompts; None: by its chat template if it has one."""

    def __init__(self, config: Config, device: str):
        self.config, self.device, self.root, self.batch_tokens = config, device, None, 4096
        self.teacher: Pass | None = None
        self.surroundings: Surroundings | None = None

    def prepare(self, surroundings: Surroundings) -> None:
        self.root, self.batch_tokens, self.surroundings = (
            surroundings.store_root,
            surroundings.batch_tokens,
            surroundings,
        )

    def _open(self) -> None:
        import tempfile

        directory = locate(self.config.model, self.config.name)
        if self.root is None:  # outside the score stage there is no store to keep the pass in
            self.scratch = tempfile.TemporaryDirectory()
            self.root = Path(self.scratch.name)
        model = external_model(directory, self.root / "digests")
        self.tokenizer = load_tokenizer(directory)
        self.template = self.config.template or ("chat" if has_chat_template(directory) else "plain")
        self.teacher = Pass(self.root, model, self.config.dtype, self.device, self.batch_tokens)

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.teacher is None:
            self._open()
        prompts, responses = [], []
        for item in batch:
            prompt = encode_prompt(self.tokenizer, item.prompt["messages"], self.template)
            prompts += [prompt] * len(item.generations)
            responses += [self._response(row) for row in item.generations]
        full = [k for k, response in enumerate(responses) if response]
        self.teacher.fill([prompts[k] for k in full], [responses[k] for k in full])
        if self.surroundings is not None:
            self.teacher.account(self.surroundings)
        rows = dict(zip(full, self.teacher.get([prompts[k] for k in full], [responses[k] for k in full]), strict=True))
        results, start = [], 0
        for item in batch:
            values = [self._value(rows.get(start + k)) for k in range(len(item.generations))]
            results.append(Scores(np.array([value for value, _ in values]), None, [reason for _, reason in values]))
            start += len(item.generations)
        return results

    def _response(self, row: dict[str, Any]) -> list[int]:
        ids = list(self.tokenizer(row["completion"], add_special_tokens=False).input_ids)
        return (
            [*ids, self.tokenizer.eos_token_id]
            if row["finish_reason"] == "stop" and self.tokenizer.eos_token_id is not None
            else ids
        )

    def _value(self, logps: np.ndarray | None) -> tuple[float, str]:
        if logps is None:
            return float("nan"), "empty completion"
        if np.isnan(logps).any():
            return float("nan"), "longer than the teacher's context"
        logps = logps.astype(np.float64)
        return float(logps.mean() if self.config.normalise else logps.sum()), ""

    def metrics(self) -> dict[str, float]:
        """Passes paid and found so far."""
        return {"teacher/misses": self.teacher.misses, "teacher/hits": self.teacher.hits} if self.teacher else {}
