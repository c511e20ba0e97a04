"""Stages - the responses as a teacher sees them: its own tokens of the same text, after its own rendering of the
prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import Message
from data_contracts.shard_rows import RowsByPrompt, ShardRows
from stages.job import Job
from stages.models.logps import Pass
from stages.models.policy import batches_by_budget, collate, response_logits
from stages.models.tokens import tokenizer_digest
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns, turns_of_reader, turns_or_plain, with_room_for_system
from stages.weighting.weights.base import Tokens
from stages.weighting.weights.spans import TokenText, check_offsets

SIDES = ("chosen", "rejected")
Rows = list[dict[str, Any]]


class TeacherView:
    """Student and teacher tokens of the same responses, and the teacher's log-probs of its own.

    The student's control tokens never reach the teacher: it reads the messages in its own chat template
    (`teacher_prompt: auto`, where the policy reads a chat), or the text between the student's control tokens (`raw`).
    Its responses end with its own terminator.
    """

    def __init__(self, job: Job, scored: bool, unshifted: bool):
        for name in ("teacher", "reference" if "reference" in job.inputs else "policy"):
            if name not in job.inputs:
                raise ConfigError(
                    f"the weights need the model `{name}`: give it as an input of weigh, or as `{name}` of the run"
                )
        student, teacher = job.path("reference" if "reference" in job.inputs else "policy"), job.path("teacher")
        self.shared = tokenizer_digest(student) == tokenizer_digest(teacher)
        self.student = turns_or_plain(student, job.config)
        prompt_style = getattr(job.config.weights, "teacher_prompt", "raw" if unshifted else "auto")
        chat = self.student.settings.is_chat if prompt_style == "auto" else prompt_style == "chat_template"
        self.teacher = turns_of_reader(teacher, job.config) if chat else Turns(teacher, TurnConfig(template="plain"))
        if prompt_style == "chat_template" and self.teacher.chat is None:
            raise ConfigError(
                f"the teacher in {teacher} has no chat template, and weights.teacher_prompt is chat_template: "
                "set it to raw or auto"
            )
        self.reader = TokenText(self.student.tokenizer)
        check_offsets(self.teacher.tokenizer)
        self.messages = None if self.teacher.chat is None else MessagesByPrompt(job)
        runtime = job.config.runtime
        options = {"kind": "unshifted", "score": score_unshifted} if unshifted else {}
        self.scored = scored
        self.scores = Pass(
            job.store_root, job.inputs["teacher"], job.config.dtype, runtime.device, runtime.batch_tokens, **options
        )

    def _text(self, ids: Sequence[int]) -> tuple[str, Any]:
        """Text and spans of a response without the token that ended it."""
        return self.reader.read(ids[:-1] if self.student.ended(ids) else ids)

    def _prompts(self, rows: Rows) -> list[list[int]]:
        """The prompt of each row in the teacher's tokens."""
        if self.messages is None:
            return [self._text_prompt(row) for row in rows]
        messages = self.messages.of([row["prompt_id"] for row in rows])
        prompts = {prompt_id: self.teacher.prompt(turns) for prompt_id, turns in messages.items()}
        return [prompts[row["prompt_id"]] for row in rows]

    def _text_prompt(self, row: dict[str, Any]) -> list[int]:
        """The text between the student's control tokens."""
        text_ids = [number for number in row["prompt_ids"] if number not in self.student.control_ids]
        if self.shared:
            return [*self.teacher.opening, *text_ids]
        return self.teacher.plain(
            self.student.tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _encode(
        self, sides: list[tuple[dict[str, Any], str]]
    ) -> tuple[list[str], list[Any], list[list[int]], list[Any]]:
        """Texts, student spans, teacher ids and teacher spans of responses."""
        responses = [list(row[f"{side}_ids"]) for row, side in sides]
        read = [self._text(response) for response in responses]
        texts, spans = [text for text, _ in read], [span for _, span in read]
        if self.shared:
            return texts, spans, [self._shared_response(response) for response in responses], spans
        ids, teacher_spans = self.teacher.text.encode_with_spans(texts)
        closed = [
            [*row_ids, self.teacher.terminator] if self.student.ended(response) else list(row_ids)
            for row_ids, response in zip(ids, responses, strict=True)
        ]
        return texts, spans, closed, teacher_spans

    def _shared_response(self, ids: list[int]) -> list[int]:
        """The student's own ids, which need not be what the tokenizer makes of their text; the teacher may end its
        turns otherwise."""
        if not self.student.ended(ids) or self.teacher.terminator == self.student.terminator:
            return ids
        return [*ids[:-1], self.teacher.terminator]

    def responses(self, rows: Rows) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and responses in the teacher's tokens, in the order of the weigh stage."""
        sides = _sides(rows)
        return self._prompts([row for row, _ in sides]), self._encode(sides)[2]

    def chosen(self, rows: Rows) -> list[tuple[list[int], list[int]]]:
        """(prompt, chosen response) of every row in the teacher's tokens."""
        sides = [(row, "chosen") for row in rows]
        return list(zip(self._prompts(rows), self._encode(sides)[2], strict=True))

    def batch(self, rows: Rows) -> dict[str, Any]:
        """The fields of a ResponseBatch that concern text and teacher."""
        sides = _sides(rows)
        texts, spans, teacher_ids, teacher_spans = self._encode(sides)
        ended = [self.student.ended(row[f"{side}_ids"]) for row, side in sides]
        fields: dict[str, Any] = {
            "ended": ended,
            "texts": texts,
            "student": Tokens.of([row[f"{side}_ids"] for row, side in sides], spans, ended),
        }
        fields["teacher"] = Tokens.of(teacher_ids, teacher_spans, ended)
        if self.scored:
            values = self.scores.get(self._prompts([row for row, _ in sides]), teacher_ids)
            fields["teacher_logps"] = np.concatenate(values) if values else np.zeros(0)
        return fields


class MessagesByPrompt:
    """The messages of the stage's prompts, of which a million take 16 MB."""

    def __init__(self, job: Job):
        """Raises: ConfigError if the prompts are not given."""
        if "prompts" not in job.inputs:
            raise ConfigError("a prompt in another template needs the messages: give the input `prompts`")
        self.key, self.rows = job.inputs["prompts"].key, RowsByPrompt(ShardRows([job.path("prompts")], "prompts"))

    def of(self, prompt_ids: Sequence[str]) -> Mapping[str, list[Message]]:
        """The messages of each of these prompts. Raises: ContractError for a prompt that is not among them."""
        distinct = list(dict.fromkeys(prompt_ids))
        messages: dict[str, list[Message]] = {}
        for prompt_id, rows in zip(distinct, self.rows.pick(distinct), strict=True):
            if not rows:
                raise ContractError(f"the prompt {prompt_id!r} of the pairs is not in prompts {self.key}")
            messages[prompt_id] = rows[0]["messages"]
        return messages


class SystemPrompts:
    """The same prompts under another system prompt (TIS-DPO (P)): only the prompt differs, the responses are scored as
    they are."""

    def __init__(self, job: Job):
        base = job.path("reference" if "reference" in job.inputs else "policy")
        self.turns, self.messages = with_room_for_system(Turns(base, job.config)), MessagesByPrompt(job)

    def encode(self, prompt_ids: Sequence[str], system: str) -> list[list[int]]:
        """The tokens of each of these prompts."""
        prompts: dict[str, list[int]] = {}
        for prompt_id, messages in self.messages.of(prompt_ids).items():
            rest = [message for message in messages if message["role"] != "system"]
            prompts[prompt_id] = self.turns.prompt([{"role": "system", "content": system}, *rest])
        return [prompts[prompt_id] for prompt_id in prompt_ids]


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
