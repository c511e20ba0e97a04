"""Stages - what the judged benchmarks ask of a judge. Who answers (an HTTP endpoint, a local model, a test) is given from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_contracts.errors import ConfigError
from stages.scoring.endpoint import Endpoint

Messages = Sequence[Mapping[str, str]]
"""[{"role", "content"}, ...]"""


class Reply(NamedTuple):
    text: str
    top_logprobs: Mapping[str, float] | None = None
    """Token -> log-probability of the alternatives at the first position; only if asked for with top_logprobs=N."""


class JudgeFailed(Exception):
    """No answer came, or one that says nothing. The judgment is counted as failed and enters no mean."""


class Judge(Protocol):
    name: str
    """Scores are only comparable between runs with the same judge: it goes into every row."""

    def complete(self, messages: Messages, **options: Any) -> Reply:
        """One answer. Options: temperature, max_tokens, top_logprobs. Raises: JudgeFailed.

        A judge that can answer many at once also has complete_all(conversations, **options) -> [Reply or None, ...].
        """


def ask_all(judge: Judge, conversations: Sequence[Messages], **options: Any) -> list[Reply | None]:
    """The replies in order; None where the judge failed."""
    together = getattr(judge, "complete_all", None)
    if together is not None:
        return list(together(conversations, **options))
    return [_ask(judge, messages, options) for messages in conversations]


def _ask(judge: Judge, messages: Messages, options: dict[str, Any]) -> Reply | None:
    try:
        return judge.complete(messages, **options)
    except JudgeFailed:
        return None


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint: parallel requests, answers kept in the store."""

    def __init__(self, model: str, endpoint: Endpoint):
        self.name, self.endpoint = model, endpoint

    def complete(self, messages: Messages, **options: Any) -> Reply:
        (reply,) = self.complete_all([messages], **options)
        if reply is None:
            raise JudgeFailed(f"{self.name} gave no answer")
        return reply

    def complete_all(self, conversations: Sequence[Messages], **options: Any) -> list[Reply | None]:
        if "top_logprobs" in options:
            options["logprobs"] = True
        requests = [{"model": self.name, "messages": list(messages), **options} for messages in conversations]
        return [
            None if reply.body is None else Reply(reply.text, _first_token(reply.body))
            for reply in self.endpoint.ask(requests)
        ]


def _first_token(body: dict[str, Any]) -> dict[str, float] | None:
    try:
        return {
            one["token"]: float(one["logprob"]) for one in body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        }
    except (KeyError, IndexError, TypeError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of a JSON list. Raises: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSONL: {error}") from None
    return rows
