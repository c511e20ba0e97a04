"""Contracts - prompts: a JSONL file that people write, checked line by line, and the rows that stages read.

One line: {"prompt_id": "...", "messages": [{"role": "user", "content": "..."}], "checks": [...], "response": "..."}
`checks` (verifiable instructions), `response` (a ground truth), and `chosen` with `rejected` (a given pair) are optional; `prompt` may stand
for one user message.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError
from data_contracts.identity import digest_text

ROLES = ("system", "user", "assistant")
TEXTS = ("response", "chosen", "rejected")
KEYS = {"prompt_id", "messages", "prompt", "checks", "source", *TEXTS}


def load_prompts(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a prompt file, in its order.

    Raises: ConfigError naming file and line for malformed JSON, wrong fields, a duplicate id; and for a missing or empty file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a name with a NUL in it
        raise ConfigError(f"cannot read the prompt file {path!r}: {error}") from None
    rows, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line, f"{path} line {number}")
        if row["prompt_id"] in seen:
            raise ConfigError(
                f"{path} line {number}: the prompt_id {row['prompt_id']!r} was already used in line {seen[row['prompt_id']]}; ids must be unique"
            )
        seen[row["prompt_id"]] = number
        rows.append(row)
    if not rows:
        raise ConfigError(f"the prompt file {path} is empty: at least one JSON line is needed")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be a prompt") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff): that is no text") from None
    except ValueError as error:  # a number of five thousand digits
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a JSON object, got {type(data).__name__}")
    if unknown := data.keys() - KEYS:
        raise ConfigError(f"{where} has the unknown field(s) {sorted(unknown)}; known: {sorted(KEYS)}")
    if ("messages" in data) == ("prompt" in data):
        raise ConfigError(f'{where} needs exactly one of "messages" and "prompt"')
    messages = data["messages"] if "messages" in data else [{"role": "user", "content": data["prompt"]}]
    _check_messages(messages, where)
    checks = data.get("checks", [])
    if not isinstance(checks, list) or not all(
        isinstance(check, dict) and isinstance(check.get("name"), str) for check in checks
    ):
        raise ConfigError(f'{where}: "checks" must be a list of objects with a "name", got {checks!r:.120}')
    if ("chosen" in data) != ("rejected" in data):
        raise ConfigError(f'{where}: "chosen" and "rejected" come together')
    for name in ("prompt_id", "source", *TEXTS):
        if data.get(name) is not None and (not isinstance(data[name], str) or not data[name]):
            raise ConfigError(f'{where}: "{name}" must be non-empty text, got {data[name]!r:.80}')
    return {
        "prompt_id": data.get("prompt_id")
        or digest_text(json.dumps(messages, sort_keys=True, ensure_ascii=False))[:16],
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
        "checks": json.dumps(checks, sort_keys=True, ensure_ascii=False),
        **{name: data.get(name) for name in TEXTS},
        "source": data.get("source") or "",
    }


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: "messages" must be a non-empty list')
    for message in messages:
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or message["role"] not in ROLES
            or not isinstance(message["content"], str)
        ):
            raise ConfigError(
                f'{where}: a message must be {{"role": one of {", ".join(ROLES)}, "content": text}}, got {message!r:.120}'
            )
    if messages[-1]["role"] == "assistant":
        raise ConfigError(f"{where}: the last message must not be the assistant's: that is what the policy will write")
    if not any(message["content"].strip() for message in messages):
        raise ConfigError(f"{where}: every message is blank")


def text_of(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def _trigrams(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def near_duplicates(left: Sequence[str], right: Sequence[str], threshold: float) -> list[tuple[int, int, float]]:
    """Pairs (i, j, similarity) of texts whose word 3-gram Jaccard similarity is at least `threshold`; case and punctuation do not count.

    Only pairs that share a 3-gram are compared, through an inverted index.
    """
    index = defaultdict(list)
    right_grams = [_trigrams(text) for text in right]
    for j, grams in enumerate(right_grams):
        for gram in grams:
            index[gram].append(j)
    found = []
    for i, text in enumerate(left):
        grams = _trigrams(text)
        for j in sorted({j for gram in grams for j in index[gram]}):
            similarity = len(grams & right_grams[j]) / len(grams | right_grams[j])
            if similarity >= threshold:
                found.append((i, j, similarity))
    return found


def check_disjoint(train: list[dict[str, Any]], heldout: list[dict[str, Any]], threshold: float = 0.8) -> None:
    """Refuse a held-out prompt that also trains: measuring on it would measure memory.

    Raises: ConfigError naming the first offenders.
    """
    ids = {row["prompt_id"] for row in train} & {row["prompt_id"] for row in heldout}
    if ids:
        raise ConfigError(
            f"{len(ids)} prompt id(s) are both in the training and in the held-out file, e.g. {sorted(ids)[:3]}"
        )
    hits = near_duplicates([text_of(row) for row in heldout], [text_of(row) for row in train], threshold)
    if hits:
        i, j, similarity = max(hits, key=lambda hit: hit[2])
        raise ConfigError(
            f"{len(hits)} held-out prompt(s) are (nearly) in the training set, e.g. {heldout[i]['prompt_id']!r} and {train[j]['prompt_id']!r} "
            f"(similarity {similarity:.2f}, limit {threshold}): remove one of each pair"
        )
