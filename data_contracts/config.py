"""Contracts - the two kinds of settings: what a thing is (`Config`) and how it is run (`Runtime`).

Only a `Config` is part of an artifact's identity. A `Runtime` nested anywhere inside it (device count, batch size, interpreter) is
left out of the key: it may move the last bits of a bf16 result, never its meaning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_contracts.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    # For type checkers, which do not read model_config: every settings class is frozen, so that a subclass may narrow a field
    # (`name: Literal["dpo"]`); and without field specifiers `= Field(1, ge=0)` counts as the default it is.
    @dataclass_transform(frozen_default=True, kw_only_default=True)
    class FrozenModel(ModelMetaclass): ...

else:
    FrozenModel = type(BaseModel)


class Config(BaseModel, metaclass=FrozenModel):
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


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; the items of a list of mappings by their number. An empty mapping is a value of its own."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
        )
    return flat


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
            untold = problem["type"] in ("missing", "extra_forbidden") or "secret" in message or "password" in message
            lines.append(f"  {path}: {message}" + ("" if untold else f" (got {problem['input']!r:.120})"))
        raise ConfigError(f"{where}: {len(lines)} problem(s) in the settings\n" + "\n".join(lines)) from None


class _Loader(yaml.SafeLoader):
    """YAML as it is meant: a key given twice is a mistake, not a wish for the second one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key != "<<":
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice, again in line {mark.line + 1}: remove one", mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True))


def load_yaml(text: str, where: str) -> Any:
    """Raises: ConfigError for what is not YAML, or would need Python to be run, or never ends."""
    try:
        return yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{where} is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    except (
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # the 30th of February, a list as a key, a thousand brackets
        raise ConfigError(f"{where} is not valid YAML: {str(error) or type(error).__name__}") from None


def read_yaml(path: os.PathLike | str) -> dict[str, Any]:
    """A YAML file as a mapping. Raises: ConfigError if it is missing, malformed or not a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise ConfigError(f"cannot read the run config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a name with a NUL in it
        raise ConfigError(f"cannot read the run config {path!r}: {error}") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data
