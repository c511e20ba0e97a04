"""Stages - the interface between the judged benchmarks and a judge: an HTTP endpoint, a local model or a test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_contracts.errors import ConfigError
from stages.scoring.endpoint import Endpoint

Messages = Sequence[Mapping[str, str]]
"""[{"role", "content"}, ...]"""


class JudgeReply(NamedTuple):
    """What a judge wrote."""

    text: str
    top_logprobs: Mapping[str, float] | None = None
    """Token -> log-probability of the alternatives at the first position; only if asked for with top_logprobs=N."""


class Judge(Protocol):
    """Whoever reads the answers."""

    name: str
    """Scores are only comparable between runs with the same judge, so the name goes into every row."""

    def ask(self, conversations: Sequence[Messages], **options: Any) -> list[JudgeReply | None]:
        """The replies in order; None for a reply that cannot be read: it is counted as failed and enters no mean.

        Options: temperature, max_tokens, top_logprobs.
        """
        ...


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint: requests go out in parallel, answers are kept in the store."""

    def __init__(self, model: str, endpoint: Endpoint):
        self.name, self.endpoint = model, endpoint

    def ask(self, conversations: Sequence[Messages], **options: Any) -> list[JudgeReply | None]:
        """The replies in order; None where what came cannot be read.

        Raises: what `Endpoint.ask` raises for a judge that does not answer.
        """
        if "top_logprobs" in options:
            options["logprobs"] = True
        requests = [{"model": self.name, "messages": list(messages), **options} for messages in conversations]
        replies: list[JudgeReply | None] = []
        for reply in self.endpoint.ask(requests):
            if reply.body is None:
                replies.append(None)
            else:
                replies.append(JudgeReply(reply.text, _first_token(reply.body)))
        return replies


def _first_token(body: dict[str, Any]) -> dict[str, float] | None:
    """Token -> log-probability at the first position of a chat completion; None if the completion has none."""
    try:
        alternatives = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {str(alternative["token"]): float(alternative["logprob"]) for alternative in alternatives}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or of a file with one JSON list.

    Raises: ConfigError for a file that cannot be read, has no rows, or rows that are no objects.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSONL: {error}") from None
    if not rows:
        raise ConfigError(f"{path} has no rows: the file is empty; fetch it again")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} is {type(row).__name__}, expected an object with named fields")
    return rows


def check_fields(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse rows without a text in each of the named fields, before a policy answers them. Raises: ConfigError."""
    for number, row in enumerate(rows):
        for name in names:
            if not isinstance(row.get(name), str):
                raise ConfigError(
                    f"{path}: `{name}` of row {number} is {json.dumps(row[name])[:80] if name in row else 'missing'}, "
                    "expected a text: fetch the file again, or mend the row"
                )
