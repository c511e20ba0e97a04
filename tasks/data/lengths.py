"""Tasks - prompts that the policy can read: counted by the model's own tokenizer, in the sampler's interpreter.

This process may have no transformers. Counting takes seconds and a finished run is asked again, so answers are
remembered by content.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.errors import ConfigError, StageError
from data_contracts.identity import digest_file
from data_contracts.prompts import Message, name_of
from stages.models.tokens import context_length
from stages.sampling.check import ANSWER
from stages.sampling.stage import SamplingConfig
from tasks.data.drops import Drops
from tasks.data.memory import Memory
from tasks.data.preparation import Prepared
from tasks.data.prompt_set import PromptSet
from tasks.data.selection import without
from tasks.data.source import PromptsConfig
from tasks.launch import POLL_SECONDS, StageProcess
from tasks.models import LoadedModel

CHECK = "stages.sampling.check"
OVERLONG = "longer than sampling.max_prompt_tokens"
SHOWN = 3


class Findings(NamedTuple):
    """What the tokenizer says of one set of prompts, by row from 0 (stages/sampling/check.py)."""

    overlong: dict[int, int]
    """Tokens of a prompt that has too many."""
    truncated: dict[int, list[Message]]
    """What is left of it when its beginning is cut; of one that cannot be cut, nothing."""
    dropped: dict[int, str]
    """Why the settings drop a row."""
    unusable: dict[int, str]
    """Why the template or the settings refuse it."""

    @classmethod
    def of(cls, answer: Mapping[str, Mapping[str, Any]]) -> Findings:
        """From JSON, whose keys are text."""
        return cls(*({int(row): value for row, value in answer[name].items()} for name in cls._fields))


def fit_to_model(
    prepared: Prepared,
    config: PromptsConfig,
    samplings: Sequence[SamplingConfig],
    model: Path,
    memory: Memory,
    models: Sequence[LoadedModel] = (),
) -> Prepared:
    """The prompts that the policy can read. samplings: of the training prompts, and of the held-out ones; models: every
    model of the run, checked by the same process.

    A part of `train` that will be held out is bound to the limits of the training prompts.

    Raises: ConfigError for a model that cannot be loaded whole, prompts that the template cannot write, and such that are
    too long, where the settings refuse them.
    """
    sets = (prepared.train, prepared.heldout)
    truncate = config.overlong == "truncate_left"
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    settings = [sampling.model_dump(mode="json") for sampling in samplings]
    question = {
        "check": "tokens",
        "python": samplings[0].runtime.python or sys.executable,
        "sets": [[dump, prompts.digest, truncate] for dump, prompts in zip(settings, sets, strict=True)],
        "files": [[path.name, digest_file(path)] for path in files],
        "models": [[loaded.task, *loaded.digests()] for loaded in models],
    }
    answers = memory.recall(question, lambda: _ask(sets, settings, truncate, model, question["python"], models))
    fitted = [
        _fitted(prompts, Findings.of(answer), config, sampling, model)
        for prompts, answer, sampling in zip(sets, answers, samplings, strict=True)
    ]
    (train, dropped, notes), (heldout, heldout_dropped, heldout_notes) = fitted
    prepared.drops.update(dropped)
    prepared.heldout_drops.update(heldout_dropped)
    notes = [*prepared.notes, *notes, *(f"held-out prompts: {note}" for note in heldout_notes)]
    return prepared._replace(train=train, heldout=heldout, notes=notes)


def _fitted(
    prompts: PromptSet, findings: Findings, config: PromptsConfig, sampling: SamplingConfig, model: Path
) -> tuple[PromptSet, Drops, list[str]]:
    if findings.unusable:
        rows = [
            f"{prompts.where(row)}: the prompt {name_of(prompts[row])}: {why}" for row, why in _first(findings.unusable)
        ]
        raise ConfigError(_said(f"{len(findings.unusable)} prompts cannot be written by the template of {model}", rows))
    if findings.overlong and config.overlong == "refuse":
        limit = f"allowed are 1 to {sampling.max_prompt_tokens} (sampling.max_prompt_tokens; "
        limit += f"the model's context is {context_length(model)})"
        rows = [
            f"{prompts.where(row)}: the prompt {name_of(prompts[row])} has {count} tokens, {limit}"
            for row, count in _first(findings.overlong)
        ]
        what = f"{len(findings.overlong)} of {len(prompts)} prompts are too long"
        raise ConfigError(_said(what, rows, "Raise the limit, or set prompts.overlong to drop or truncate_left"))
    dropped = {
        row: f"{name_of(prompts[row])} has {count} tokens"
        for row, count in findings.overlong.items()
        if row not in findings.truncated
    }
    notes = []
    if findings.truncated:
        notes.append(
            f"{len(findings.truncated)} prompts were too long and lost their beginning (overlong: truncate_left)"
        )
        prompts = prompts.map(
            lambda row, prompt: {**prompt, "messages": findings.truncated.get(row, prompt["messages"])}
        )
    reasons = {**dict.fromkeys(dropped, OVERLONG), **findings.dropped}
    sentences = dropped | {row: name_of(prompts[row]) for row in findings.dropped}
    fitted, drops = without(prompts, sentences, reasons)
    return fitted, drops, notes


def _first(rows: Mapping[int, Any]) -> list[tuple[int, Any]]:
    return sorted(rows.items())[:SHOWN]


def _said(what: str, rows: Sequence[str], advice: str = "") -> str:
    return "\n  ".join([what, *rows, *([advice] if advice else [])])


def _ask(
    sets: Sequence[PromptSet],
    samplings: Sequence[dict[str, Any]],
    truncate: bool,
    model: Path,
    python: str,
    models: Sequence[LoadedModel],
) -> Any:
    """The answers of stages/sampling/check.py. Raises: ConfigError as the check says; StageError if it broke."""
    with tempfile.TemporaryDirectory() as directory:
        request: dict[str, Any] = {
            "model": str(model),
            "sets": [],
            "models": [[str(path), task] for path, task in models],
        }
        for number, (prompts, sampling) in enumerate(zip(sets, samplings, strict=True)):
            path = Path(directory) / f"{number}.arrow"
            prompts.write(path)
            request["sets"].append({"sampling": sampling, "prompts": str(path), "truncate": truncate})
        path = Path(directory) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        answer = path.with_name(ANSWER)
        code, output = run_check(python, path)
        if code not in (0, ConfigError.exit_code) or not answer.is_file():
            raise StageError(f"the check of the prompts in {python} ended with code {code}:\n{output[-2000:]}")
        content = json.loads(answer.read_text(encoding="utf-8"))
    if code:
        raise ConfigError(content)
    return content


def run_check(python: str, request: Path) -> tuple[int, str]:
    """Run stages/sampling/check.py in an interpreter; returns its exit code and its output.

    Raises: ConfigError for an interpreter that cannot be run.
    """
    if shutil.which(python) is None:
        raise ConfigError(f"sampling.runtime.python = {python!r} cannot be run: there is no such program")
    log_file = request.with_name("log")
    with StageProcess([str(request)], module=CHECK, python=python, log_file=log_file, log=lambda line: None) as check:
        while not check.wait(POLL_SECONDS):
            pass
    return check.process.returncode, log_file.read_text(errors="replace") if log_file.is_file() else ""
