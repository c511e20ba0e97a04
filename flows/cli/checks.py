"""Flows - the checks that a prompt may carry, those of other packages too: what each asks for, its value, an example."""

from __future__ import annotations

import json
from collections.abc import Iterator

from data_contracts.errors import ConfigError
from stages.scoring.checks import NOTHING, TABLE, Check

WIDTH = 16


def list_checks() -> Iterator[str]:
    """Yield lines on every check. One that does not load costs its own line, never the list."""
    yield 'In a row of prompts: "checks": [{"name": ..., "value": ...}, ...]'
    for name in TABLE.names():
        yield ""
        try:
            lines = _described(name, TABLE.get(name))
        except ConfigError as error:
            lines = [f"cannot be used: {error}"]
        yield f"{name:{WIDTH}} {lines[0]}"
        yield from (f"{'':{WIDTH}} {line}" for line in lines[1:])


def _described(name: str, check: Check) -> list[str]:
    """What the check asks for, how a row spells it, and an answer that satisfies it."""
    spec = {"name": name} | ({} if check.example is None else {"value": check.example})
    lines = [check.doc]
    if check.argument != NOTHING:
        lines.append(f"value: {check.argument.expected}")
    if check.example is not None or check.argument == NOTHING:
        lines.append(json.dumps(spec, ensure_ascii=False))
    if check.answer:
        lines.append(f"satisfied by: {json.dumps(check.answer, ensure_ascii=False)}")
    return lines
