"""Turn rows through the turn contract: what `python -m tests.conformance turns.json` does with a list of conversations.

A row is {tokenizer, chat, messages, answer, prompt_ids, response_ids, terminator, terminator_text}, or has `refused`
where the template takes no such messages. The tokenizers lie in directories of their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns


def check_turns(rows: list[dict[str, Any]], tokenizers: Path) -> tuple[int, list[str]]:
    """Rows passed, and a line for each that failed. A tokenizer is loaded once."""
    opened: dict[str, Turns] = {}
    failures = []
    for number, row in enumerate(rows):
        name = f"row {number} ({row.get('tokenizer')}, {row.get('chat')})"
        try:
            turns = opened.get(row["tokenizer"])
            if turns is None:
                settings = TurnConfig(template="plain") if row.get("template") == "plain" else TurnConfig()
                turns = opened[row["tokenizer"]] = Turns(tokenizers / row["tokenizer"], settings)
            problem = check_row(turns, row)
        except Exception as error:  # a row that raises has failed; the others still run
            problem = f"{type(error).__name__}: {error}"
        if problem:
            failures.append(f"{name}: {problem}")
    return len(rows) - len(failures), failures


def check_row(turns: Turns, row: dict[str, Any]) -> str | None:
    """What is wrong with the row; None if nothing is."""
    if row.get("refused"):
        try:
            turns.prompt(row["messages"])
        except ConfigError:
            return None
        return "the template should refuse these messages"
    if turns.terminator != row["terminator"] or turns.terminator not in turns.stop_ids:
        return f"terminator {turns.terminator}, expected {row['terminator']} (stop ids {turns.stop_ids})"
    for name, got in (("prompt_ids", turns.prompt(row["messages"])), ("response_ids", turns.response(row["answer"]))):
        if got != row[name]:
            return f"{name} {got}, expected {row[name]}"
    return None
