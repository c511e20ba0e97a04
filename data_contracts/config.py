"""Contracts - the two kinds of settings: what an artifact is (`Config`) and how it is computed (`Runtime`).

Only a `Config` is part of an artifact's identity. A `Runtime` nested anywhere inside it (device count, batch size,
interpreter) is left out of the key: it may move the last bits of a bf16 result, never its meaning.
"""

from __future__ import annotations

import ast
import inspect
import os
import stat
import textwrap
from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, dataclass_transform

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_contracts.errors import ConfigError
from data_contracts.redaction import redact_value, secret_in
from data_contracts.suggestions import suggestion
from data_contracts.words import plural

LONGEST_PIPE = 16 << 20
Model = TypeVar("Model", bound=BaseModel)

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass

    # For type checkers, which do not read model_config: every settings class is frozen, so that a subclass may narrow a
    # field (`name: Literal["dpo"]`); and without field specifiers `= Field(1, ge=0)` counts as the default it is.
    @dataclass_transform(frozen_default=True, kw_only_default=True)
    class FrozenModel(ModelMetaclass): ...

else:
    FrozenModel = type(BaseModel)


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field that has one, by the field's name, inherited fields included.

    The source is read when this is called. pydantic's `use_attribute_docstrings` reads it as every class is made, which
    took 0.15 s of each command, and only forms and `selfplay init` show them.
    """
    docstrings: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):  # typed into an interpreter: a form without its descriptions
            continue
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docstrings[field.target.id] = inspect.cleandoc(text.value.value)
    return {name: text for name, text in docstrings.items() if name in model.model_fields}


def _describe_fields(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the fields' docstrings to a JSON schema of the model."""
    for name, text in field_docstrings(model).items():
        field = schema["properties"].get(model.model_fields[name].alias or name)
        if field is not None:
            field.setdefault("description", text)


class Config(BaseModel, metaclass=FrozenModel):
    """Settings that are frozen and refuse unknown keys. The docstring below a field describes it in forms."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra=_describe_fields, allow_inf_nan=False, defer_build=True
    )

    NEUTRAL: ClassVar[dict[str, Any]] = {}
    """Fields that were added later, with the value that means "as before". A field at that value is left out of the
    identity, so that old artifacts are still found."""

    def identity(self) -> dict[str, Any]:
        """Return the part that names an artifact: every field except `Runtime` fields and neutral ones.

        >>> class Sampling(Config):
        ...     temperature: float = 1.0
        ...     top_k: int = 0
        ...     runtime: Runtime = Runtime()
        ...     NEUTRAL = {"top_k": 0}
        >>> Sampling().identity(), Sampling(top_k=5).identity()
        ({'temperature': 1.0}, {'temperature': 1.0, 'top_k': 5})
        """
        fields: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            is_neutral = name in self.NEUTRAL and value == self.NEUTRAL[name]
            if not isinstance(value, Runtime) and not is_neutral:
                fields[field.alias or name] = _identity_of_value(value)
        return fields


class Runtime(Config):
    """Settings that say how a stage is executed. They are never part of an identity."""


def _identity_of_value(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, dict):
        return {key: _identity_of_value(item) for key, item in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_identity_of_value(item) for item in cast(list[Any], value)]
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    return value


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name; the items of a list of mappings by their number.

    >>> flatten({"train": {"steps": 2}, "tasks": [{"path": "a"}, {"path": "b"}], "empty": {}})
    {'train.steps': 2, 'tasks.0.path': 'a', 'tasks.1.path': 'b', 'empty': {}}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in cast(list[Any], value)):
            value = {str(number): item for number, item in enumerate(cast(list[Any], value))}
        if isinstance(value, Mapping) and value:
            flat |= flatten(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def parse(model: type[Model], data: Any, where: str) -> Model:
    """Return `data` as a `model`.

    Raises: ConfigError that names `where` (the file or option that `data` came from) and has one line per problem.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems: list[str] = []
        for detail in error.errors():
            path = ".".join(str(part) for part in detail["loc"]) or "(top level)"
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] == "extra_forbidden":
                message = f"unknown key{suggestion(model, data, detail['loc'])}"
            is_secret = "secret" in message or "password" in message or secret_in({path.rpartition(".")[2]: "x"})
            if detail["type"] not in ("missing", "extra_forbidden") and not is_secret:
                message += f" (got {redact_value(detail['input'])!r:.120})"
            problems.append(f"  {path}: {message}")
        count = plural(len(problems), "problem")
        raise ConfigError(f"{where} cannot be used because of {count}:\n" + "\n".join(problems)) from None


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not a wish for the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue
            key, mark = str(key_node.value), key_node.start_mark
            if key in seen:
                line = mark.line + 1 if mark else 0
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice, again in line {line}: remove one", mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_map)


def load_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text that `where` names.

    Raises: ConfigError for a text that is not YAML, asks for Python to be run, or is nested without end.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{where} is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:  # the 30th of February, a list as a key, 1,000 brackets
        raise ConfigError(f"{where} is not valid YAML: {str(error) or type(error).__name__}") from None


_PIPES: dict[tuple[int, int], str] = {}
"""What was read of pipes, by device and inode: a command asks for its config more than once."""


def _read_once(path: os.PathLike[str] | str) -> str:
    with open(path, encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            return file.read()
        key = (status.st_dev, status.st_ino)
        if key not in _PIPES:
            text = file.read(LONGEST_PIPE + 1)
            if len(text) > LONGEST_PIPE:
                raise ConfigError(f"{path} does not end within {LONGEST_PIPE >> 20} MiB: it is no run config")
            _PIPES[key] = text
        return _PIPES[key]


def read_yaml(path: os.PathLike[str] | str) -> dict[str, Any]:
    """Return a YAML file as a mapping. A pipe (`<(cat run.yaml)`) is read once, and remembered in this process.

    Raises: ConfigError if it is missing, too long, malformed or no mapping.
    """
    try:
        text = _read_once(path)
    except FileNotFoundError as error:
        hint = "`selfplay presets` lists those that come with the pipeline"
        raise ConfigError(f"cannot read the run config {path}: {error.strerror}; {hint}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the run config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a name with a NUL in it
        raise ConfigError(f"cannot read the run config {str(path)!r}: {error}") from None
    data = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return cast(dict[str, Any], data)
