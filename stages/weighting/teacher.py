"""Stages - the responses as a teacher sees them: its own tokens of the same text, after its own rendering of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_contracts.errors import ConfigError
from data_contracts.shards import read_shards
from stages.job import Job
from stages.models.logps import Pass
from stages.models.policy import batches_by_budget, collate, response_logits
from stages.models.tokens import encode_prompt, load_tokenizer, stop_ids, tokenizer_digest
from stages.weighting.weights.base import Tokens
from stages.weighting.weights.spans import TokenText, encode_with_spans

SIDES = ("chosen", "rejected")
Rows = list[dict[str, Any]]


class TeacherView:
    """Student and teacher tokens of the same responses, and the teacher's log-probs of its own."""

    def __init__(self, job: Job, scored: bool, unshifted: bool):
        for name in ("teacher", "reference" if "reference" in job.inputs else "policy"):
            if name not in job.inputs:
                raise ConfigError(
                    f"the weights need the model `{name}`: give it as an input of weigh, or as `{name}` of the run"
                )
        student = job.path("reference" if "reference" in job.inputs else "policy")
        self.shared = tokenizer_digest(student) == tokenizer_digest(job.path("teacher"))
        self.student = load_tokenizer(student)
        self.teacher = load_tokenizer(job.path("teacher"))
        self.reader = TokenText(self.student)
        self.stops = set(stop_ids(student, self.student))
        self.in_template = getattr(job.config.weights, "teacher_prompt", "raw") == "chat_template"
        self.messages = _messages(job) if self.in_template else {}
        runtime = job.config.runtime
        options = {"kind": "unshifted", "score": score_unshifted} if unshifted else {}
        self.scored = scored
        self.scores = Pass(
            job.store_root, job.inputs["teacher"], job.config.dtype, runtime.device, runtime.batch_tokens, **options
        )

    def _ended(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.stops

    def _text(self, ids: Sequence[int]) -> tuple[str, Any]:
        """Text and spans of a response without its EOS."""
        return self.reader.read(ids[:-1] if self._ended(ids) else ids)

    def _prompt(self, row: dict[str, Any]) -> list[int]:
        """raw: the very text that the student saw; chat_template: the messages in the teacher's own template."""
        if self.in_template:
            return encode_prompt(self.teacher, self.messages[row["prompt_id"]], "chat")
        if self.shared:
            return row["prompt_ids"]
        return list(self.teacher(self.student.decode(row["prompt_ids"], skip_special_tokens=False)).input_ids)

    def _encode(
        self, sides: list[tuple[dict[str, Any], str]]
    ) -> tuple[list[str], list[Any], list[list[int]], list[Any]]:
        """Texts, student spans, teacher ids and teacher spans of responses."""
        read = [self._text(row[f"{side}_ids"]) for row, side in sides]
        texts, spans = [text for text, _ in read], [span for _, span in read]
        if self.shared:
            return texts, spans, [list(row[f"{side}_ids"]) for row, side in sides], spans
        ids, teacher_spans = encode_with_spans(self.teacher, texts)
        eos = self.teacher.eos_token_id
        closed = [
            [*row_ids, eos] if eos is not None and self._ended(row[f"{side}_ids"]) else list(row_ids)
            for row_ids, (row, side) in zip(ids, sides, strict=True)
        ]
        return texts, spans, closed, teacher_spans

    def responses(self, rows: Rows) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses in the teacher's tokens, in the order of the weigh stage."""
        sides = _sides(rows)
        return [self._prompt(row) for row, _ in sides], self._encode(sides)[2]

    def chosen(self, rows: Rows) -> list[tuple[list[int], list[int]]]:
        """(prompt, chosen response) of every row in the teacher's tokens."""
        sides = [(row, "chosen") for row in rows]
        return list(zip([self._prompt(row) for row in rows], self._encode(sides)[2], strict=True))

    def batch(self, rows: Rows) -> dict[str, Any]:
        """The fields of a ResponseBatch that concern text and teacher."""
        sides = _sides(rows)
        texts, spans, teacher_ids, teacher_spans = self._encode(sides)
        ended = [self._ended(row[f"{side}_ids"]) for row, side in sides]
        teacher_ended = [end and (self.shared or self.teacher.eos_token_id is not None) for end in ended]
        fields: dict[str, Any] = {
            "ended": ended,
            "texts": texts,
            "student": Tokens.of([row[f"{side}_ids"] for row, side in sides], spans, ended),
        }
        fields["teacher"] = Tokens.of(teacher_ids, teacher_spans, teacher_ended)
        if self.scored:
            values = self.scores.get([self._prompt(row) for row, _ in sides], teacher_ids)
            fields["teacher_logps"] = np.concatenate(values) if values else np.zeros(0)
        return fields


class SystemPrompts:
    """The same prompts under another system prompt (TIS-DPO (P)): only the prompt differs, the responses are scored as they are."""

    def __init__(self, job: Job):
        base = job.path("reference" if "reference" in job.inputs else "policy")
        self.tokenizer, self.messages = load_tokenizer(base), _messages(job)

    def encode(self, prompt_id: str, system: str) -> list[int]:
        rest = [message for message in self.messages[prompt_id] if message["role"] != "system"]
        return encode_prompt(self.tokenizer, [{"role": "system", "content": system}, *rest], "chat")


def score_unshifted(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], budget: int
) -> list[np.ndarray]:
    """SWIFT's released indexing, one position late; for `swift_released` only."""
    from stages.models.lazy import torch
    from stages.weighting.weights.swift_released import unshifted_logps

    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for rows in batches_by_budget(
            [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)], budget
        ):
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows]).to(device)
            values = unshifted_logps(response_logits(model, batch), batch).float().cpu().numpy()
            for i, row in zip(rows, values, strict=True):
                results[i] = row[: len(responses[i])].copy()
    return results


def _sides(rows: Rows) -> list[tuple[dict[str, Any], str]]:
    return [(row, side) for side in SIDES for row in rows if row[f"{side}_ids"]]


def _messages(job: Job) -> dict[str, Any]:
    if "prompts" not in job.inputs:
        raise ConfigError("a prompt in another template needs the messages: give the input `prompts`")
    return {row["prompt_id"]: row["messages"] for row in read_shards(job.path("prompts"), "prompts").to_pylist()}
