"""Flows - a first run config for somebody's own data and model: what the data holds decides how rows are made."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_contracts.checkpoint import has_chat_template
from data_contracts.errors import ConfigError
from stages.methods import METHODS
from stages.models.tokens import context_length
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns
from stages.scoring.pairing import PAIRINGS
from tasks.data.display import ANSWERS, lengths
from tasks.data.prompt_set import PromptSet
from tasks.data.reading import Reading, read_source
from tasks.data.source import Source
from tasks.models import locate, model_named

HELDOUT_SHARE = 0.05
SAMPLE = 1000
"""Rows that are read to see what they hold."""
SHORTEST = 64
"""Tokens that prompts and answers get at least."""


def settings_for(method: str, data: str, policy: str | None, beside: Path) -> dict[str, Any]:
    """The sections of a run config that the data and the model decide; paths are relative to the directory `beside`.

    Raises: ConfigError for data or a model that cannot be read, or that lacks what the method trains on.
    """
    source = Source(path=data)
    reading = read_source(source.model_copy(update={"limit": SAMPLE}))
    answers = {name for name in ANSWERS if reading.prompts.column(name).null_count < len(reading.prompts)}
    prompts: dict[str, Any] = {
        "train": _relative(data, beside),
        "heldout": HELDOUT_SHARE,
        "overlong": "drop",
        "reuse": True,
    }
    config: dict[str, Any] = {"prompts": prompts, "evaluation": {"scorer": {"name": _scorer(reading, "length")}}}
    config |= _rows_made_of(method, answers, reading, prompts)
    if policy is not None:
        config |= _sizes(policy, reading.prompts, beside, config)
    return config


def _rows_made_of(method: str, answers: Collection[str], reading: Reading, prompts: dict[str, Any]) -> dict[str, Any]:
    """How rows are made: of given answers where there are such, else of sampled ones."""
    spec = METHODS.get(method)
    pairing = PAIRINGS.get(spec.PAIRING)
    if method == "seqkd":
        prompts["answers_from_teacher"] = True
        return {"scoring": {"pairing": spec.PAIRING}, "sampling": {"num_candidates": 1}}
    if pairing.texts:
        if "response" not in answers and answers:
            prompts["columns"] = _better_answers_as_truth(method, reading)
        elif "response" not in answers:
            raise ConfigError(
                f"{method} trains on a `response`, and the data has none: name its column, or give other data"
            )
        return {"scoring": {"pairing": spec.PAIRING}, "sampling": {"num_candidates": 1}}
    takes_single = "win_rates" in spec.needs(METHODS.config(method))
    if {"chosen", "rejected"} <= set(answers) and (not pairing.is_single or takes_single):
        return {"scoring": {"pairing": "given"}, "sampling": {"num_candidates": 1}, "iterations": 1}
    return {"scoring": {"scorer": {"name": _scorer(reading, "pairrm" if not pairing.is_single else "length")}}}


def _better_answers_as_truth(method: str, reading: Reading) -> dict[str, str]:
    """Columns that make the better answer of a pair the truth."""
    if "chosen" not in reading.used or not {"prompt", "messages"} & set(reading.used):
        raise ConfigError(
            f"{method} trains on a `response`, and the data has pairs without a prompt column: "
            "write it with `selfplay data "
            "--out FILE.jsonl`, and read that with columns {prompt: prompt, response: chosen}"
        )
    prompt = next(name for name in ("prompt", "messages") if name in reading.used)
    return {prompt: prompt, "response": "chosen"}


def _scorer(reading: Reading, otherwise: str) -> str:
    """`checks` where the prompts have such."""
    if any(row["checks"] != "[]" for row in reading.prompts[:SAMPLE]):
        return "checks"
    return otherwise


def _sizes(policy: str, prompts: PromptSet, beside: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The model, its template, and room for nearly all prompts and answers."""
    chosen = model_named(policy)
    model = {"path": _relative(policy, beside)} if chosen.path else {"hub_id": policy}
    directory = locate(chosen, False)
    settings = TurnConfig(template="chat" if has_chat_template(directory) else "plain")
    counts = lengths(prompts, Turns(directory, settings))
    context = context_length(directory) or 2048
    longest_answer = max((int(counts[name].max()) for name in ANSWERS if name in counts), default=256)
    new_tokens = min(_round(longest_answer), context // 2)
    prompt_tokens = min(_round(int(counts["prompt"].max())), context - new_tokens)
    sampling = {"template": settings.template, "max_prompt_tokens": prompt_tokens, "max_new_tokens": new_tokens}
    scoring = config["scoring"] | {"max_response_tokens": new_tokens}
    return {"policy": model, "sampling": config.get("sampling", {}) | sampling, "scoring": scoring}


def _round(tokens: int) -> int:
    """The next power of two."""
    return max(SHORTEST, 1 << (tokens - 1).bit_length())


def _relative(path: str, beside: Path) -> str:
    """A path as a config in this directory may write it."""
    if Path(path).is_absolute():
        return path
    return os.path.relpath(path, beside)
