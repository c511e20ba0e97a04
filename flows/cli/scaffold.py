"""Flows - a first run config for a method: what must be set, and as comments every other setting with its default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from data_contracts.config import Config, field_docstrings
from data_contracts.errors import ConfigError
from flows.cli.own_data import settings_for
from flows.config import RunConfig, merge
from stages.evaluation.stage import EvaluationConfig
from stages.methods import METHODS
from stages.scoring.pairing import PAIRINGS
from stages.weighting.weights import WEIGHTS
from tasks.data.source import Source

SET_BY_RUN = {
    "training": {"method", "seed"},
    "sampling": {"seed"},
    "weighting": {"reference", "old_policy", "history", "teacher_tokens", "drop_identical", "quantised"},
}
"""Fields that the run fills in; a config does not set them."""


def commented_config(method: str, data: str | None = None, policy: str | None = None, beside: Path = Path()) -> str:
    """YAML that runs as it is: on `data` and `policy`, or on this checkout's own (after `make model`).

    Every setting that is not needed is a comment, `# field: default   # meaning`. `beside`: the directory that the
    config's paths are relative to. Raises: ConfigError for an unknown method, and for data that it cannot train on.
    """
    chosen = essentials(method)
    if data is not None:
        data_settings = settings_for(method, data, policy, beside)
        chosen = merge(
            {name: value for name, value in chosen.items() if name not in ("prompts", "scoring")}, data_settings
        )
        if policy is not None and "models" in chosen:
            chosen["models"] = {"teacher": data_settings["policy"]}
    elif policy is not None:
        raise ConfigError("--policy goes with --data: give both, or neither")
    run = RunConfig.model_validate(chosen)
    file_name = f"{chosen['name']}.yaml"
    lines = [
        f"# {method}: {run.spec.SOURCE}",
        f"#   selfplay run {file_name}            estimate it first: selfplay estimate {file_name}",
        "# A commented line shows a default: remove its # to change it.",
        "",
    ]
    descriptions = field_docstrings(RunConfig)
    for name in RunConfig.model_fields:
        value = getattr(run, name)
        if name == "method":
            head = ["", f"# {descriptions[name]}", "method:", f"  name: {method}"]
            lines += head + _fields(value, {}, "  ", skip={"name"})
        elif isinstance(value, Config) and name != "policy":
            lines += _section(name, value, chosen.get(name, {}))
        else:
            lines += _entry(name, value, descriptions.get(name), name in chosen, "")
    return "\n".join(lines) + "\n"


def _section(name: str, section: Config, chosen: dict[str, Any]) -> list[str]:
    """The lines of a section; its name is a comment too where nothing in it is set."""
    title = _title(type(section))
    if isinstance(section, EvaluationConfig):
        title = ["# How each iteration is measured."]
        if section.scorer.name == "length":
            title.append(
                "# `length` knows nothing of quality. Read the log-prob of the true responses, or the accuracy on"
            )
            title.append("# pairs, that the report shows; or name a judge, a reward model or checks (docs/scoring.md).")
    fields = _fields(section, chosen, "  ", SET_BY_RUN.get(name, set()))
    mark = "" if chosen and fields else "# "
    return ["", *title, f"{mark}{name}:", *fields]


def essentials(method: str) -> dict[str, Any]:
    """The smallest config of a method that runs on this checkout's own prompts and model."""
    spec = METHODS.get(method)
    config: dict[str, Any] = {
        "name": method.replace("_", "-"),
        "policy": {"path": "models/smollm2-135m-instruct"},
        "iterations": 2,
        "prompts": {
            "train": "deploy/prompts/tiny.jsonl",
            "heldout": "deploy/prompts/quickstart_heldout.jsonl",
            "reuse": True,
        },
        "method": {"name": method},
        "sampling": {"backend": {"name": "vllm"}, "num_candidates": 5, "max_prompt_tokens": 128, "max_new_tokens": 32},
        "scoring": {},
        # A likelihood takes a larger rate than a preference, which moves two of them apart.
        "training": {"learning_rate": 1e-5 if spec.PAIRING == "truth" else 1e-6, "batch_size": 4},
        "evaluation": {"scorer": {"name": "checks"}},
    }
    if PAIRINGS.get(spec.PAIRING).needs_scores:
        config["scoring"] = {"scorer": {"name": "checks"}}
    else:
        config["sampling"]["num_candidates"] = 1
        config["scoring"] = {"pairing": spec.PAIRING}
    if method == "seqkd":
        config["prompts"]["answers_from_teacher"] = True
    if method == "seqkd" or _needs_teacher(method):
        config["models"] = {"teacher": {"path": "models/smollm2-135m-instruct"}}
    return config


def _needs_teacher(method: str) -> bool:
    """Whether the method's loss, or the token weights that it has by default, read a teacher."""
    spec = METHODS.get(method)
    weights = WEIGHTS.config(spec.WEIGHTS or "ones")
    needs = {need.removesuffix("_unshifted") for need in WEIGHTS.get(weights.name).needs(weights)}
    needs |= spec.needs(METHODS.config(method))
    return bool(needs & {"teacher", "teacher_logits"})


def _title(section: type[Config]) -> list[str]:
    """The section's docstring as comments."""
    doc = (section.__doc__ or "").strip()
    return [f"# {line.strip()}" for line in doc.splitlines() if line.strip()]


def _fields(section: Config, chosen: dict[str, Any], indent: str, skip: set[str]) -> list[str]:
    """A line for each field of a section, a comment unless it is chosen."""
    lines, descriptions = [], field_docstrings(type(section))
    for name in type(section).model_fields:
        if name not in skip:
            lines += _entry(name, getattr(section, name), descriptions.get(name), name in chosen, indent)
    return lines


def _entry(name: str, value: Any, description: str | None, is_chosen: bool, indent: str) -> list[str]:
    mark = "" if is_chosen else "# "
    comment = f"    # {' '.join(description.split())}" if description else ""
    return [f"{indent}{mark}{name}: {_text(value)}{comment}"]


def _plain(value: Config) -> Any:
    """Settings as plain data; of a source, only what it says."""
    if not isinstance(value, Source):
        return {key: item for key, item in value.model_dump(mode="json").items() if item is not None}
    fields = value.model_dump(mode="json", exclude_defaults=True)
    if fields.keys() == {"path"}:
        return fields["path"]
    return fields


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    if value is PydanticUndefined or value is None:
        return "null"
    if isinstance(value, Config):
        value = _plain(value)
    plain = json.loads(json.dumps(value))  # tuples as lists
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
