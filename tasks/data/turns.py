"""Tasks - pieces of rows as the public sets write them: turns, conversations, dialogues in one text."""

from __future__ import annotations

import json
import re
from typing import Any

from data_contracts.prompts import Message, UnusableRow

SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
DIALOGUE = re.compile(r"\n\n(Human|Assistant): ?")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def text(value: Any, name: str) -> str:
    """Raises: UnusableRow if the value of the column `name` is no text."""
    if isinstance(value, str):
        return value
    raise UnusableRow(f"`{name}` is not text", f'"{name}" must be text, got {value!r:.80}')


def conversation(value: Any, name: str) -> list[Message]:
    """Turns of {role, content} or {from, value} as messages; one turn alone is a conversation too. Raises:
    UnusableRow."""
    if isinstance(value, str) and value[:1] in ("[", "{"):  # how a spreadsheet holds a list
        value = parsed(value)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise UnusableRow(
            f"`{name}` is no conversation", f'"{name}" must be a non-empty list of turns, got {value!r:.80}'
        )
    messages = [_message(turn, name) for turn in turns]
    if messages[-1]["role"] == "assistant" and turns[-1].get("weight") == 0:  # OpenAI's fine-tuning files
        raise UnusableRow(f"the last turn of `{name}` has weight 0", f'"{name}" ends with an answer of weight 0')
    return messages


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow(
            f"a turn of `{name}` is no message", f'a turn of "{name}" must be a message, got {turn!r:.80}'
        )
    speaker = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        reason = f"a turn of `{name}` is not by system, user or assistant"
        raise UnusableRow(reason, f'a turn of "{name}" is by {speaker!r:.40}, not by one of system, user, assistant')
    if turn.get("tool_calls"):
        raise UnusableRow(f"a turn of `{name}` calls tools")
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    return {"role": role, "content": "" if content is None else text(content, f"{name}[].content")}


def _part(part: Any, name: str) -> str:
    """The text of one part of a message's content. Raises: UnusableRow for an image and the like."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    message = f'a turn of "{name}" holds {kind!s:.40}, which is not text'
    raise UnusableRow(f"a turn of `{name}` holds something that is not text", message)


def dialogue(value: str) -> list[Message] | None:
    """The turns of a text "\\n\\nHuman: ...\\n\\nAssistant: ..."; None where it is no such dialogue."""
    head, *parts = DIALOGUE.split(value if value.startswith("\n") else f"\n\n{value}")
    if head.strip() or not parts:
        return None
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [user(content) if speaker == "Human" else assistant(content) for speaker, content in turns]


def last_answer(turns: list[Message], name: str) -> str:
    """The text of a conversation's last turn. Raises: UnusableRow if that is not the assistant's."""
    if not turns or turns[-1]["role"] != "assistant":
        raise UnusableRow(f"`{name}` does not end with the assistant's turn")
    return turns[-1]["content"]


def parsed(value: str) -> Any:
    """The value of a JSON text; a text that is none, as it is."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
