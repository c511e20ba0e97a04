"""Flows - the head of report.html: what the run is, on what it ran, where its model lies and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.adapter import ADAPTER, is_adapter_only, weights_directory
from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from flows.config import RunConfig
from stages.registry import Named

TIME = "%Y-%m-%dT%H:%M:%S%z"
"""Format of the time in a record."""


class Fact(NamedTuple):
    """A line of the head."""

    label: str
    value: str


class About(NamedTuple):
    """What the head of a run's page says."""

    facts: Sequence[Fact] = ()
    load: str = ""
    """Python that loads the trained model; "" before anything is trained."""


def about(
    config: RunConfig, data: Sequence[str], records: Iterable[ArtifactRecord], trained: ArtifactRef | None
) -> About:
    """Return what the head of the page says of a run.

    data: lines on the prompts, the counts first. records: of its artifacts. trained: the policy that the run has made so
    far; None before the first training.
    """
    records = [record for record in records if record.provenance]
    facts = {
        "method": _method(config),
        "scored by": _scorers(config),
        "reference": _reference(config),
        "policy": _model(config.policy),
        "warm start": _warm_start(config),
        **{name: _model(model) for name, model in config.models if model is not None},
        "data": f"{config.prompts.train}; held out: {config.prompts.heldout}",
        "prompts": data[0] if data else "",
        "seed": str(config.seed),
        "hardware": _joined(_hardware(record) for record in records),
        "software": _joined(_versions(record) for record in records if record.stage == "train"),
        "built": _dates(records),
        "checkpoint": trained.path if trained else "",
    }
    load = loading_lines(Path(trained.path)) if trained else ""
    return About([Fact(label, value) for label, value in facts.items() if value], load)


def _method(config: RunConfig) -> str:
    """Return the method with its settings, and the token weights where it has any."""
    text = _settings(config.method)
    if config.weights.name != "ones":
        text += f"; token weights: {_settings(config.weights)}"
    return text


def _scorers(config: RunConfig) -> str:
    """Return what scores the answers that train, and the held-out ones."""
    heldout = f"held out: {_settings(config.evaluation.scorer)}"
    return f"{_settings(config.scoring.scorer)}; {heldout}" if config.scoring.scorer else heldout


def changed_settings(config: Config) -> dict[str, Any]:
    """Return what differs from the defaults, as a run config says it: with the name of every plug-in.

    >>> from stages.sampling.stage import SamplingConfig
    >>> changed_settings(SamplingConfig(backend="transformers", top_k=40, runtime={"prompts_per_shard": 8}))
    {'backend': {'name': 'transformers'}, 'top_k': 40, 'runtime': {'prompts_per_shard': 8}}
    """
    changed: dict[str, Any] = {"name": config.name} if isinstance(config, Named) else {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value != field.get_default(call_default_factory=True):
            changed[name] = _plain(value)
    return changed


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return changed_settings(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _warm_start(config: RunConfig) -> str:
    """Return how the policy was trained before the first iteration; "" if it was not."""
    if config.warm_start is None:
        return ""
    values = [f"{name} {_short(value)}" for name, value in config.warm_start if name != "method"]
    return f"{_settings(config.warm_start.method)} on the prompts' responses ({', '.join(values)})"


def _settings(chosen: Named) -> str:
    """Return a plug-in's name with its settings in brackets."""
    settings = chosen.model_dump(mode="json", exclude={"name"})
    values = ", ".join(f"{name} {_short(value)}" for name, value in settings.items() if value is not None)
    return f"{chosen.name} ({values})" if values else chosen.name


def _short(value: Any) -> str:
    """Return a value as people write it in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _reference(config: RunConfig) -> str:
    rule = config.reference_rule
    if isinstance(rule, ModelRef):
        return _model(rule)
    if isinstance(rule, str):
        return {"iterate": "the policy as each iteration finds it", "start": "the start model"}[rule]
    return f"the policy of every {rule.every} iterations"


def _model(model: ModelRef) -> str:
    name = model.path or model.hub_id or ""
    return f"{name} @ {model.revision}" if model.revision else name


def _hardware(record: ArtifactRecord) -> str:
    """Return the machine that built an artifact; records before this field existed say the host alone."""
    machine = record.provenance.get("hardware")
    if machine:
        return str(machine)
    host = record.provenance.get("host")
    return f"host {host}" if host else ""


def _versions(record: ArtifactRecord) -> str:
    versions = record.provenance.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _dates(records: Sequence[ArtifactRecord]) -> str:
    """Return when the first and the last of the artifacts were finished, in UTC."""
    times = []
    for record in records:
        try:
            times.append(datetime.strptime(record.provenance.get("time", ""), TIME).astimezone(UTC))
        except ValueError:
            continue
    if not times:
        return ""
    first, last = min(times), max(times)
    if first.date() == last.date():
        return f"{first:%Y-%m-%d %H:%M} to {last:%H:%M} UTC"
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def loading_lines(checkpoint: Path) -> str:
    """Return Python that loads a checkpoint with transformers, and with peft where it keeps an adapter only."""
    load = f"tokenizer = AutoTokenizer.from_pretrained({str(checkpoint)!r})\n"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    if not is_adapter_only(checkpoint):
        return f"{imports}{load}model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})"
    try:
        base = str(weights_directory(checkpoint))
    except ConfigError:  # the model under the adapter is gone: the page still says where the adapter is
        base = "the base model's directory"
    imports += "from peft import PeftModel\n"
    load += f"model = AutoModelForCausalLM.from_pretrained({base!r})\n"
    return f"{imports}{load}model = PeftModel.from_pretrained(model, {str(checkpoint / ADAPTER)!r})"
