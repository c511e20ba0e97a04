"""Flows - the run form: the settings of a run as a JSON schema whose defaults are the chosen preset's own values.

Prefect shows a deployment's parameters by such a schema, and checks by it what somebody typed before a run exists. The
form sends back whole sections; `changes` reduces them to the single fields that differ from the preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from data_contracts.errors import ConfigError
from flows.config import RUN_LEVEL_FIELDS, RunConfig
from stages.registry import FAMILIES, FAMILY

Schema = dict[str, Any]


def form_values(preset: RunConfig) -> dict[str, Any]:
    """Return the settings of a run as its form shows them: without those that the run sets for its sections."""
    values = preset.model_dump(mode="json")
    for section, field in RUN_LEVEL_FIELDS:
        if values[section] is not None:
            del values[section][field]
    return values


def run_schemas(preset: Mapping[str, Any] | None) -> dict[str, Schema]:
    """Return the schema of every field of a run by name, with the values of `preset` as defaults.

    preset: the `form_values` of a run config, or None. Without it there are no defaults, and every field may be left out:
    a default that the form sent would replace what the config file says.
    """
    schemas: dict[str, Schema] = {}
    for name, schema in _blank_schemas().items():
        if preset is None:
            schemas[name] = _nullable(_without_defaults(schema))
        else:
            schemas[name] = _with_values(schema, preset[name])
    return schemas


def changes(values: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of `values` differs from `preset`, nested as in a run config. A list counts as one value.

    A plug-in (a section with a `name`) of another name counts as a whole: the preset's settings are of another plug-in.

    >>> preset = {"seed": 0, "method": {"name": "dpo", "beta": 0.1}, "sampling": {"top_p": 1.0, "max_new_tokens": 32}}
    >>> changes({"seed": 0, "sampling": {"top_p": 0.9, "max_new_tokens": 32}}, preset)
    {'sampling': {'top_p': 0.9}}
    >>> changes({"method": {"name": "dpo", "beta": 0.5}}, preset), changes({"method": {"name": "sft"}}, preset)
    ({'method': {'beta': 0.5, 'name': 'dpo'}}, {'method': {'name': 'sft'}})
    """
    different: dict[str, Any] = {}
    for key, value in values.items():
        base = preset.get(key)
        if key in preset and value == base:
            continue
        if not (isinstance(value, Mapping) and isinstance(base, Mapping)):
            different[key] = value
            continue
        section, earlier = cast("Mapping[str, Any]", value), cast("Mapping[str, Any]", base)
        if section.get("name", earlier.get("name")) != earlier.get("name"):
            different[key] = dict(section)
        elif changed := changes(section, earlier):
            different[key] = changed | ({"name": earlier["name"]} if "name" in earlier else {})
    return different


@lru_cache(maxsize=1)
def _blank_schemas() -> dict[str, Schema]:
    """The fields' schemas without references, with plug-ins as choices; what a run sets for a section is not in it."""
    whole = RunConfig.model_json_schema()
    fields = {name: _resolved(schema, whole["$defs"], ()) for name, schema in whole["properties"].items()}
    for section, field in RUN_LEVEL_FIELDS:
        for option in fields[section].get("anyOf", [fields[section]]):
            option.get("properties", {}).pop(field, None)
    return fields


def _resolved(schema: Any, definitions: Mapping[str, Schema], parents: tuple[str, ...]) -> Any:
    """A copy in which definitions stand where they are referred to, nothing is required, and plug-ins are choices."""
    if isinstance(schema, list):
        return [_resolved(item, definitions, parents) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = cast(Schema, schema)
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in parents:  # a section inside itself: any object
            return {"type": "object", "additionalProperties": True}
        inner = _resolved(definitions[name], definitions, (*parents, name))
        return inner | {key: value for key, value in schema.items() if key != "$ref"}
    if FAMILY in schema:
        return _plugin_choice(schema[FAMILY]) | {
            key: schema[key] for key in ("description", "default") if key in schema
        }
    copy = {
        ("anyOf" if key == "oneOf" else key): _resolved(value, definitions, parents)
        for key, value in schema.items()
        if key not in ("required", "discriminator")
    }
    if "properties" in copy:  # a setting may itself be called `required`; each bears the name that it has in a file
        properties = schema["properties"].items()
        copy["properties"] = {
            name: _resolved(item, definitions, parents) | {"title": name} for name, item in properties
        }
    return copy


@lru_cache(maxsize=16)
def _plugin_choice(family: str) -> Schema:
    """One option per plug-in of a family, with its own fields; those with few fields first.

    The form opens the option that has most keys in common with a value, and of several the first.
    """
    registry = next(item for item in FAMILIES if item.family == family)
    options: list[Schema] = []
    for name in registry.names():
        try:
            schema = registry.get(name).Config.model_json_schema()
        except ConfigError:  # another package's, which does not load: the others can still be chosen
            continue
        option = _plugin_fields(schema)
        option["title"] = name
        options.append(option)
    options.sort(key=lambda option: len(option["properties"]))
    names = {"type": "string", "enum": [option["title"] for option in options]}
    # The names stand beside the options for the sake of the message: a wrong name is refused with the right ones.
    return {"title": family, "properties": {"name": names}, "anyOf": options}


def _plugin_fields(schema: Schema) -> Schema:
    """The schema of a plug-in's settings; plug-ins inside it are chosen by name, with any settings."""
    definitions = schema.pop("$defs", {})

    def without_families(item: Any) -> Any:
        if isinstance(item, list):
            return [without_families(value) for value in item]
        if isinstance(item, dict):
            return {key: without_families(value) for key, value in item.items() if key != FAMILY}
        return item

    return _resolved(without_families(schema), without_families(definitions), ())


def _with_values(schema: Schema, value: Any) -> Schema:
    """The schema with `value` as its default, in every field; of several options the one that is chosen comes first."""
    schema = dict(schema)
    if "anyOf" in schema:
        options = cast("list[Schema]", schema["anyOf"])
        chosen = next((option for option in options if _is_option_of(option, value)), None)
        if chosen is not None:
            others = [option for option in options if option is not chosen]
            schema["anyOf"] = [_with_values(chosen, value), *others]
            if value is None:
                schema["anyOf"] = [*others, chosen]
    elif isinstance(value, Mapping) and "properties" in schema:
        fields = cast("dict[str, Schema]", schema["properties"])
        schema["properties"] = {
            name: _with_values(field, value[name]) if name in value else field for name, field in fields.items()
        }
    schema["default"] = value
    return schema


def _is_option_of(option: Schema, value: Any) -> bool:
    if "anyOf" in option:
        return any(_is_option_of(inner, value) for inner in option["anyOf"])
    if isinstance(value, Mapping) and option.get("type") == "object":
        fields = cast("dict[str, Schema]", option.get("properties", {}))
        names = fields.get("name", {})
        if "name" in value and "const" in names:
            return value["name"] == names["const"]
        return value.keys() <= fields.keys() or option.get("additionalProperties", False) is not False
    kinds = {
        "string": isinstance(value, str) and value in option.get("enum", [value]),
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "array": isinstance(value, list | tuple),
        "null": value is None,
    }
    return kinds.get(option.get("type", ""), False)


def _without_defaults(schema: Any) -> Any:
    """A copy without defaults, but for the names of plug-ins and with them the choice between those."""
    if isinstance(schema, list):
        return [_without_defaults(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = cast(Schema, schema)
    return {key: _without_defaults(value) for key, value in schema.items() if key != "default" or "const" in schema}


def _nullable(schema: Schema) -> Schema:
    """The schema with null as its default."""
    if any(option.get("type") == "null" for option in schema.get("anyOf", ())):
        return schema | {"default": None}
    head = {key: schema[key] for key in ("title", "description") if key in schema}
    return head | {"anyOf": [{"type": "null"}, schema], "default": None}
