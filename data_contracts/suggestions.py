"""Contracts - what a person may have meant by a setting that no settings class has: the nearest name, or its section."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast, get_args, runtime_checkable

from pydantic import BaseModel

MOST_SECTIONS = 3
"""A name that stands in more sections than this points to none of them."""

Model = type[BaseModel]


@runtime_checkable
class Chooser(Protocol):
    """What stands beside a field's type (`Annotated`) and picks the settings class by the value: a table of plug-ins."""

    def settings_class(self, value: Any) -> Model | None:
        """Return the class that the value is settings of; None if it names none."""
        ...


def suggestion(model: Model, data: Any, loc: tuple[int | str, ...]) -> str:
    """Return how a message goes on that calls the setting at `loc` of `data` unknown; "" if nothing is near.

    A section that has the very name counts first, of several the least deep; then the nearest name of the same section.

    >>> from pydantic import create_model
    >>> Training = create_model("Training", learning_rate=(float, 1e-6))
    >>> Run = create_model("Run", training=(Training, ...))
    >>> suggestion(Run, {}, ("training", "learning_rat")), suggestion(Run, {}, ("learning_rate",))
    ('; did you mean learning_rate?', '; did you mean training.learning_rate?')
    """
    name = str(loc[-1])
    elsewhere = {path for path in _paths(model, ()) if path.rpartition(".")[2] == name}
    depth = min((path.count(".") for path in elsewhere), default=0)
    meant = sorted(path for path in elsewhere if path.count(".") == depth)
    if not 0 < len(meant) <= MOST_SECTIONS:
        siblings = sorted({field for section in _classes_at(model, data, loc[:-1]) for field in section.model_fields})
        meant = difflib.get_close_matches(name, siblings, 1)
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    return ""


def _classes_at(model: Model, data: Any, loc: tuple[int | str, ...]) -> list[Model]:
    """The settings classes that a section may be of. Parts of `loc` that name the member of a union pick that member."""
    classes = [model]
    for part in loc:
        inner: list[Model] = []
        value = _item(data, part)
        for section in classes:
            if str(part) in section.model_fields:
                inner += _classes_of(section, str(part), value)
        if inner:
            classes, data = inner, value
        elif isinstance(part, int):
            data = value
        else:
            classes = [section for section in classes if section.__name__ == part] or classes
    return classes


def _item(data: Any, part: int | str) -> Any:
    """The value at a part of the way through plain data; None if there is none."""
    if isinstance(data, Mapping):
        return cast("Mapping[Any, Any]", data).get(part)
    if isinstance(data, list | tuple) and isinstance(part, int):
        items = cast("list[Any]", data)
        return items[part] if part < len(items) else None
    return None


def _classes_of(section: Model, name: str, value: Any = None) -> list[Model]:
    """The settings classes in the type of a field, and the one that its value chooses."""
    field = section.model_fields[name]
    parts = [field.annotation, *field.metadata, *_parts(field.annotation)]
    classes = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    chosen = [part.settings_class(value) for part in parts if isinstance(part, Chooser)]
    return classes + [settings for settings in chosen if settings is not None]


def _parts(annotation: Any) -> Iterator[Any]:
    """Everything that a type is made of: members of unions, items of lists, what `Annotated` holds."""
    for part in get_args(annotation):
        yield part
        yield from _parts(part)


def _paths(model: Model, above: tuple[Model, ...]) -> Iterator[str]:
    """The dotted names of all settings in a class; a class inside itself is left out."""
    for name in model.model_fields:
        yield name
        for inner in _classes_of(model, name):
            if inner not in (model, *above):
                yield from (f"{name}.{path}" for path in _paths(inner, (*above, model)))
