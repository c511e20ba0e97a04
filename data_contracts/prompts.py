"""Contracts - one row of prompts: what it holds, what makes it unusable, and the JSON line that people write it in.

One line: {"prompt_id": "...", "messages": [{"role": "user", "content": "..."}], "checks": [...], "response": "..."}
`prompt` may stand for one user message. Optional are `checks` (verifiable instructions), `response` (a ground truth),
`chosen` with `rejected` (a given pair), or `completion` with `label` (a single answer that is good or bad: a row that
holds `chosen` or `rejected` alone). Files in other formats and shapes are read by tasks/data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypedDict, cast

from data_contracts.identity import digest_text

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class PromptRow(TypedDict):
    """The columns of `prompts` in data_contracts/shards.py."""

    prompt_id: str
    messages: list[Message]
    checks: str
    response: str | None
    chosen: str | None
    rejected: str | None
    source: str


class UnusableRow(ValueError):
    """A row that nothing can be made of. Equal problems share a `reason`; the message says it of this row."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises: UnusableRow."""
    try:
        data: object = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at column {error.colno}"
        raise UnusableRow("the line is not valid JSON", message) from None
    except RecursionError:
        raise UnusableRow("the line is nested too deeply", "is nested too deeply to be a prompt") from None
    except ValueError as error:  # a number of five thousand digits
        raise UnusableRow("the line is not valid JSON", f"is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        message = f"must be a JSON object, got {type(data).__name__}"
        raise UnusableRow("the line is not a JSON object", message)
    return cast("dict[str, Any]", data)


def labelled_sides(completion: Any, label: Any) -> dict[str, Any]:
    """A single answer as the side of a pair that its label makes it. Raises: UnusableRow."""
    if not isinstance(label, bool):
        raise UnusableRow("`label` is neither true nor false", f'"label" must be true or false, got {label!r:.80}')
    return {"chosen" if label else "rejected": "" if completion is None else completion}


def prompt_row(
    messages: Any,
    *,
    prompt_id: Any = None,
    checks: Any = (),
    response: Any = None,
    chosen: Any = None,
    rejected: Any = None,
    source: Any = None,
) -> PromptRow:
    """A row whose values keep the contract of `prompts`; without an id it is named by its messages. Raises:
    UnusableRow."""
    check_messages(messages)
    if not isinstance(checks, list | tuple) or not all(
        isinstance(check, dict) and isinstance(cast("dict[str, Any]", check).get("name"), str)
        for check in cast("list[Any]", checks)
    ):
        message = f'"checks" must be a list of objects with a "name", got {checks!r:.120}'
        raise UnusableRow("`checks` is not a list of objects with a name", message)
    texts = {"prompt_id": prompt_id, "source": source, "response": response, "chosen": chosen, "rejected": rejected}
    for name, text in texts.items():
        if text is not None:
            _check_text(name, text)
    if chosen is not None and chosen == rejected:
        raise UnusableRow("`chosen` and `rejected` are identical", '"chosen" and "rejected" are identical')
    encoded_messages = _encoded(messages)
    encoded_checks = _encoded(checks) if checks else "[]"
    _check_unicode(encoded_messages, encoded_checks, *texts.values())
    return {
        "prompt_id": prompt_id or _id_of(encoded_messages),
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        "checks": encoded_checks,
        "response": response,
        "chosen": chosen,
        "rejected": rejected,
        "source": source or "",
    }


def check_messages(messages: Any) -> None:
    """Raises: UnusableRow unless these are messages that the policy can answer."""
    if not isinstance(messages, list) or not messages:
        raise UnusableRow("`messages` is empty or not a list", '"messages" must be a non-empty list')
    for message in cast("list[Any]", messages):
        if (
            not isinstance(message, dict)
            or cast("dict[str, Any]", message).keys() != {"role", "content"}
            or message["role"] not in ROLES
            or not isinstance(message["content"], str)
        ):
            expected = f'{{"role": one of {", ".join(ROLES)}, "content": text}}'
            raise UnusableRow(
                f"a message is not {expected}", f"a message must be {expected}, got {cast('object', message)!r:.120}"
            )
    turns = cast("list[Message]", messages)
    if turns[-1]["role"] == "assistant":
        raise UnusableRow(
            "the prompt ends with the assistant's message",
            "the last message must not be the assistant's: that is what the policy will write",
        )
    if not any(message["content"].strip() for message in turns):
        raise UnusableRow("the prompt is empty or blank", "every message is blank")


def _check_text(name: str, text: Any) -> None:
    message = f'"{name}" must be non-empty text, got {text!r:.80}'
    if not isinstance(text, str):
        raise UnusableRow(f"`{name}` is not text", message)
    if not text.strip():
        raise UnusableRow(f"`{name}` is empty or blank", message)


def _check_unicode(*texts: str | None) -> None:
    try:
        for text in texts:
            if text is not None:
                text.encode()
    except UnicodeEncodeError:
        message = "holds half of a surrogate pair (\\ud800 to \\udfff), or bytes that are not UTF-8: that is no text"
        raise UnusableRow("the text cannot be decoded", message) from None


def text_of(row: Mapping[str, Any]) -> str:
    """All messages of a prompt as one text."""
    return "\n".join(message["content"] for message in row["messages"])


def own_line(row: PromptRow) -> str:
    """The row as a line of our own format, from which it can be read again as it is."""
    messages = row["messages"]
    line: dict[str, Any] = {"prompt_id": row["prompt_id"]} if has_written_id(row) else {}
    if len(messages) == 1 and messages[0]["role"] == "user":
        line["prompt"] = messages[0]["content"]
    else:
        line["messages"] = messages
    if checks := json.loads(row["checks"]):
        line["checks"] = checks
    if (row["chosen"] is None) != (row["rejected"] is None):
        line |= {"completion": row["chosen"] or row["rejected"], "label": row["chosen"] is not None}
    elif row["chosen"] is not None:
        line |= {"chosen": row["chosen"], "rejected": row["rejected"]}
    line |= {name: row[name] for name in ("response", "source") if row[name]}
    return json.dumps(line, ensure_ascii=False)


def name_of(row: Mapping[str, Any]) -> str:
    """What to call a row in a message: the id that its writer gave it, or the beginning of its last message."""
    if has_written_id(row):
        return repr(row["prompt_id"])
    text = " ".join(row["messages"][-1]["content"].split())
    return repr(text if len(text) <= NAME_LENGTH else text[:NAME_LENGTH] + "...")


def has_written_id(row: Mapping[str, Any]) -> bool:
    """Whether the id was written by a person or program before us, not made from the messages."""
    return not row["prompt_id"].startswith(_id_of(_encoded(row["messages"])))


NAME_LENGTH = 60


def _id_of(encoded_messages: str) -> str:
    return digest_text(encoded_messages)[:16]


def _encoded(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
