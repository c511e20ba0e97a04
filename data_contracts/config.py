"""Contracts - the two kinds of settings: what a thing is (`Config`) and how it is run (`Runtime`).

Only a `Config` is part of an artifact's identity. A `Runtime` nested anywhere inside it (device count, batch size, interpreter) is
left out of the key: it may move the last bits of a bf16 result, never its meaning.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_contracts.errors import ConfigError


class Config(BaseModel):
    """Frozen, unknown keys refused; the docstring under a field becomes its description in forms and schemas."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    NEUTRAL: ClassVar[dict[str, Any]] = {}
    """Fields added later, with the value that means "as before": dropped from the identity at that value, so old artifacts stay found."""

    def identity(self) -> dict[str, Any]:
        """The part that names an artifact: every field but the `Runtime` ones and the neutral ones."""
        out = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Runtime) or (name in self.NEUTRAL and value == self.NEUTRAL[name]):
                continue
            out[name] = _identity_value(value)
        return out


class Runtime(Config):
    """Settings that say how a stage is executed. Never part of identity."""


def _identity_value(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, dict):
        return {key: _identity_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_identity_value(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse(cls, data: Any, where: str):
    """Validate `data` as `cls`; every problem becomes one line with its dotted path.

    Raises: ConfigError, naming `where` the data came from.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(str(part) for part in problem["loc"]) or "(top level)"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = "unknown key"
            lines.append(
                f"  {path}: {message}" + ("" if problem["type"] in ("missing", "extra_forbidden") else f" (got {problem['input']!r:.120})")
            )
        raise ConfigError(f"{where}: {len(lines)} problem(s) in the settings\n" + "\n".join(lines)) from None


def read_yaml(path: os.PathLike | str) -> dict[str, Any]:
    """A YAML file as a mapping. Raises: ConfigError if it is missing, malformed or not a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the run config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data
