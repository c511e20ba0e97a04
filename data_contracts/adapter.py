"""Contracts - an adapter (LoRA) beside or instead of a model's weights: its files, and the model it belongs to.

    <checkpoint>/model.safetensors                    the merged weights, unless only the adapter is kept
    <checkpoint>/adapter/adapter_config.json          peft's own files: other programs read them
    <checkpoint>/adapter/adapter_model.safetensors    float32
    <checkpoint>/adapter/base.json                    {"content": digest of the base model's files}

Where the base model lies is in the checkpoint's record (its input `start`, or `policy` where the training had none):
a path in a data file would make equal artifacts of two machines differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_contracts.artifact import EXTERNAL, RECORD, ArtifactRef, parse_record
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic

ADAPTER = "adapter"
"""Directory of the adapter inside a checkpoint."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"


def adapter_in(checkpoint: Path | str) -> Path | None:
    """Return the adapter directory of a checkpoint; None if it has none."""
    directory = Path(checkpoint) / ADAPTER
    if (directory / ADAPTER_CONFIG).is_file():
        return directory
    return None


def is_adapter_only(checkpoint: Path | str) -> bool:
    """Return whether a checkpoint keeps an adapter and no weights of its own."""
    return adapter_in(checkpoint) is not None and not any(Path(checkpoint).glob("*.safetensors"))


def is_bare_adapter(directory: Path | str) -> bool:
    """Return whether a directory is an adapter as peft saves it: `adapter_config.json` and no model."""
    return (Path(directory) / ADAPTER_CONFIG).is_file() and not (Path(directory) / "config.json").is_file()


def weights_directory(checkpoint: Path | str) -> Path:
    """Return the directory whose safetensors a model is loaded from: the checkpoint itself, or its adapter's base.

    Raises: ConfigError if the base is gone.
    """
    if is_adapter_only(checkpoint):
        return base_of(Path(checkpoint))
    return Path(checkpoint)


def base_content(adapter: Path) -> str:
    """Return the digest of the model that an adapter belongs to. Raises: ConfigError."""
    try:
        return str(json.loads((adapter / BASE).read_text())["content"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{adapter}/{BASE} does not name the base model ({type(error).__name__}: {error})") from None


def adapter_alone(directory: Path | str) -> Path | None:
    """Return the adapter of a directory without weights: itself, as peft saves it, or what a checkpoint keeps; or None."""
    if is_bare_adapter(directory):
        return Path(directory)
    return adapter_in(directory) if is_adapter_only(directory) else None


class NamedBase(NamedTuple):
    """The model that an adapter's own files name."""

    path: Path | None
    hub_id: str | None
    revision: str | None


def named_base(adapter: Path) -> NamedBase:
    """Return the base model of an adapter that the user brought: by the record of the checkpoint that it is part of, or
    by `base_model_name_or_path`, a directory (also relative to the adapter's) or a name of the hub.

    Raises: ConfigError if nothing names one.
    """
    settings = read_adapter_config(adapter)
    if adapter.name == ADAPTER and (adapter / BASE).is_file():
        return NamedBase(base_of(adapter.parent), None, None)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{adapter}/{ADAPTER_CONFIG} names no base model: set base_model_name_or_path to its directory or hub id"
        )
    for path in (Path(name).expanduser(), adapter / name):
        if path.is_dir():
            return NamedBase(path.resolve(), None, None)
    if Path(name).is_absolute() or name.startswith("."):
        raise ConfigError(f"{adapter}/{ADAPTER_CONFIG}: the base model {name} is no directory here: correct the path")
    return NamedBase(None, name, settings.get("revision"))


def write_base(adapter: Path, content: str) -> None:
    """Name the model that an adapter belongs to, by its digest."""
    write_atomic(adapter / BASE, json.dumps({"content": content}) + "\n")


def base_of(checkpoint: Path) -> Path:
    """Return the directory of the model that a checkpoint's adapter was trained on, from the checkpoint's record.

    Raises: ConfigError if there is no record, or no such directory any more.
    """
    for owner in (checkpoint, checkpoint.parent.parent):  # the second: of a checkpoint in steps/
        try:
            record = parse_record((owner / RECORD).read_bytes(), str(owner / RECORD))
        except (OSError, ValueError):
            continue
        base = record.inputs.get("start") or record.inputs.get("policy")
        if base is not None:
            return _present(base, owner)
    raise ConfigError(f"{checkpoint} keeps an adapter only, and no {RECORD} names its base model")


def _present(base: ArtifactRef, owner: Path) -> Path:
    """The directory of a base model; where the store was moved, the one beside its owner."""
    path = Path(base.path)
    if not path.is_dir() and base.key != EXTERNAL:
        path = owner.parent / base.key
    if not path.is_dir():
        raise ConfigError(
            f"the base model of the adapter in {owner} is gone: no directory {base.path}. Put it back, or train with "
            "training.adapter.save_merged: true"
        )
    return path


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's settings, by peft's names. Raises: ConfigError if it is none that can be merged."""
    path = adapter / ADAPTER_CONFIG
    try:
        settings: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(settings).__name__}")
    settings = cast(dict[str, Any], settings)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {settings.get('peft_type')!r}, and only LORA can be merged")
    if settings.get("modules_to_save") or settings.get("trainable_token_indices"):
        raise ConfigError(
            f"{path} keeps whole modules beside its factors (modules_to_save): merge it with peft itself and give the "
            "merged directory"
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{adapter} has no {ADAPTER_WEIGHTS} (pickled .bin files are not read)")
    return settings
