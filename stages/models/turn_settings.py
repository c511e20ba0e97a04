"""Stages - settings of the turn contract (turns.py), and how a model's answers end; loads no tokenizer."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from data_contracts.config import Config
from data_contracts.errors import ConfigError
from stages.models.templates import (
    ChatTemplate,
    compile_template,
    read_controls,
    read_json,
    read_names,
    read_template,
)

MARK = "{prompt}"


class JinjaFile(Config):
    """A chat template of one's own, in place of the model's."""

    file: str
    """Path of a Jinja chat template. It is read when the settings are; its text is part of the key, its path is not."""
    jinja: str = ""
    """The template. Set for you from `file`."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("jinja") or not isinstance(value.get("file"), str):
            return value
        try:
            return value | {"jinja": Path(value["file"]).expanduser().read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the chat template {value['file']} cannot be read: {error}") from None

    @field_validator("jinja")
    @classmethod
    def _compiles(cls, source: str) -> str:
        if not source.strip():
            raise ValueError("the chat template is empty")
        try:
            compile_template(source)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return source

    def identity(self) -> dict[str, Any]:
        return {"jinja": self.jinja}


class PlainLayout(Config):
    """Plain text around the prompt's, e.g. SWIFT's `{plain: "\\n\\n<Human>:{prompt}\\n\\n<Assistant>:"}`."""

    plain: str
    """Must hold {prompt} once: the messages' texts, one below the other."""

    @field_validator("plain")
    @classmethod
    def _has_one_mark(cls, layout: str) -> str:
        if layout.count(MARK) != 1:
            raise ValueError(f"the layout must hold {MARK} exactly once, got {layout.count(MARK)} times")
        return layout


Template = Literal["chat", "plain"] | JinjaFile | PlainLayout


class TurnConfig(Config):
    """How conversations become tokens."""

    NEUTRAL: ClassVar[dict[str, Any]] = {"template_kwargs": {}, "system": "keep", "special_tokens_in_data": "text"}

    template: Template = "chat"
    """chat: the model's chat template; plain: the text as it is; {file: PATH}: a chat template of yours; {plain:
    "...{prompt}..."}: text around the prompt."""
    template_kwargs: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """What the chat template may ask for, e.g. {enable_thinking: false}."""
    system: Literal["keep", "fold", "refuse"] = "keep"
    """System messages: as they are (refused if the template has no place for them); in front of the first user turn; or
    refused."""
    special_tokens_in_data: Literal["text", "drop", "refuse"] = "text"
    """Data that spells a control token, e.g. `<|im_end|>`: it is tokenised as the text it is; its row is dropped; or it
    is refused."""

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes the prompts."""
        return self.template == "chat" or isinstance(self.template, JinjaFile)


class Ending(NamedTuple):
    """What ends a model's answers, as far as its files say without a tokenizer."""

    token: str | None
    """Text of the terminator where it is not the EOS; None where it is."""
    is_listed: bool = False
    """Whether generation_config.json names it among the EOS ids, so that sampling stopped there ever since."""


def ending_of(directory: str | Path, settings: TurnConfig) -> Ending:
    """Return how the answers of a model end by its own chat template.

    Loads no tokenizer: every key of a sampling asks for this.
    """
    if settings.template != "chat" or not Path(directory).is_dir():
        return Ending(None)
    names = ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "generation_config.json")
    paths = [Path(directory) / name for name in names]
    versions = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)
    return _ending_of(str(directory), json.dumps(settings.template_kwargs, sort_keys=True), versions)


@lru_cache(maxsize=64)
def _ending_of(directory: str, template_kwargs: str, versions: tuple[int, ...]) -> Ending:
    source, names, controls = read_template(directory), read_names(directory), read_controls(directory)
    if source is None:
        return Ending(None)
    try:
        end = ChatTemplate(source, names | json.loads(template_kwargs)).end_of_turn(controls)
    except ConfigError:  # the stage will refuse it
        return Ending(None)
    if end is None or end == names.get("eos_token"):
        return Ending(None)
    listed = read_json(Path(directory) / "generation_config.json").get("eos_token_id")
    if not isinstance(listed, list):
        listed = [listed]
    return Ending(end, controls[end] in listed)
