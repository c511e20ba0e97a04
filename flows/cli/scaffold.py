"""Flows - a first run config for a method: what has to be said, and under it, commented, everything that may be."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from data_contracts.config import Config
from flows.config import RunConfig
from stages.methods import METHODS
from stages.scoring.pairing import PAIRINGS
from stages.weighting.weights import WEIGHTS

SET_BY_RUN = {
    "training": {"method", "seed"},
    "sampling": {"seed"},
    "weighting": {"reference", "old_policy", "teacher_tokens", "drop_identical"},
}
"""Fields that the run fills in from its own."""


def commented_config(method: str) -> str:
    """YAML that runs as it is on a CPU (after `make model`), with each other setting as a comment: `# field: default   # meaning`.

    Raises: ConfigError for an unknown method.
    """
    METHODS.get(method)
    chosen = essentials(method)
    run = RunConfig.model_validate(chosen)
    spec = run.spec
    lines = [
        f"# {method}: {spec.SOURCE}",
        f"#   selfplay run {chosen['name']}.yaml            estimate it first: selfplay estimate {chosen['name']}.yaml",
        "# A commented line shows a default: remove its # to change it.",
        "",
    ]
    for name, field in RunConfig.model_fields.items():
        value = getattr(run, name)
        if name == "method":
            lines += [
                "",
                f"# {field.description}",
                "method:",
                f"  name: {method}",
                *_fields(value, {}, "  ", skip={"name"}),
            ]
        elif isinstance(value, Config) and name != "policy":
            if name == "evaluation":
                lines += ["", "# How each iteration is measured."]
            else:
                lines += ["", *_title(type(value))]
            lines += [f"{name}:", *_fields(value, chosen.get(name, {}), "  ", SET_BY_RUN.get(name, set()))]
            if lines[-1] == f"{name}:" or not chosen.get(name):
                lines[lines.index(f"{name}:")] = f"# {name}:"
        else:
            lines += _entry(name, value, field.description, name in chosen, "")
    return "\n".join(lines) + "\n"


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
        "training": {"learning_rate": 1e-6, "batch_size": 4},
        "evaluation": {"scorer": {"name": "checks"}},
    }
    if PAIRINGS.get(spec.PAIRING).needs_scores:
        config["scoring"] = {"scorer": {"name": "checks"}}
    else:
        config["sampling"]["num_candidates"] = 1
        config["scoring"] = {"pairing": spec.PAIRING}
    settings = METHODS.config(method)
    weights = WEIGHTS.config(spec.WEIGHTS or "ones")
    needs = {need.removesuffix("_unshifted") for need in WEIGHTS.get(weights.name).needs(weights)} | spec.needs(
        settings
    )
    if method == "seqkd":
        config["prompts"]["answers_from_teacher"] = True
    if needs & {"teacher", "teacher_logits"} or method == "seqkd":
        config["models"] = {"teacher": {"path": "models/smollm2-135m-instruct"}}
    return config


def _title(section: type[Config]) -> list[str]:
    doc = (section.__doc__ or "").strip()
    return [f"# {line.strip()}" for line in doc.splitlines() if line.strip()]


def _fields(section: Config, chosen: dict[str, Any], indent: str, skip: set[str]) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        if name not in skip:
            lines += _entry(name, getattr(section, name), field.description, name in chosen, indent)
    return lines


def _entry(name: str, value: Any, description: str | None, is_chosen: bool, indent: str) -> list[str]:
    mark = "" if is_chosen else "# "
    comment = f"    # {' '.join(description.split())}" if description else ""
    return [f"{indent}{mark}{name}: {_text(value)}{comment}"]


def _text(value: Any) -> str:
    if value is PydanticUndefined or value is None:
        return "null"
    plain = value.model_dump(mode="json", exclude_defaults=False) if isinstance(value, Config) else value
    if isinstance(value, Config):
        plain = {key: item for key, item in plain.items() if item is not None}
    text = yaml.safe_dump(json.loads(json.dumps(plain)), default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()
