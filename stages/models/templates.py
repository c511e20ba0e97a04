"""Stages - chat templates: how a model's own Jinja template writes a conversation. Needs neither tokenizer nor torch.

The environment is that of transformers' `apply_chat_template`, with two differences. The clock stands still
(`strftime_now`): a prompt that changes at midnight would differ between two shards of one artifact. A template that
writes without end is stopped.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_contracts.checkpoint import added_tokens
from data_contracts.errors import ConfigError
from data_contracts.prompts import Message

Messages = Sequence[Message]

CLOCK = datetime.datetime(2024, 7, 26)
"""The date that `strftime_now` gives: what Llama 3.2's template writes where it has no clock."""
LONGEST = 1 << 24
"""Characters a template may write beyond what it was given."""
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training masks; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads a class attribute

    def parse(self, parser: Parser) -> list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [Scope(body, lineno=line)]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template. Raises: ConfigError for a template that is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = CLOCK.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"line {error.lineno} of the chat template is not valid Jinja: {error.message}") from None
    except RecursionError:
        raise ConfigError("the chat template is nested too deeply to be compiled") from None
    except (MemoryError, TimeoutError):
        raise
    except Exception as error:  # constants are computed while it is compiled, and Python has limits of its own
        raise ConfigError(
            f"the chat template cannot be compiled ({type(error).__name__}: {error!s:.200}): mend it, or give "
            "another one as sampling.template {file: x.jinja}"
        ) from None


class ChatTemplate:
    """A template with the names it may use: special tokens (`bos_token`, ...) and the run's `template_kwargs`."""

    def __init__(self, source: str, names: Mapping[str, Any]):
        self.source, self.names = source, dict(names)

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The conversation as text; with the generation prompt, ready for the assistant's answer to follow.

        Raises: ConfigError if the template refuses these messages, fails, or writes more than it was given by `LONGEST`
        characters.
        """
        template = compile_template(self.source)
        conversation = [dict(message) for message in messages]
        longest = LONGEST + 4 * sum(len(message["content"]) for message in messages)
        names = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt} | self.names
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(messages=conversation, **names):
                pieces.append(str(piece))
                size += len(pieces[-1])
                if size > longest:
                    break
        except (ConfigError, MemoryError, TimeoutError):
            raise
        except Exception as error:  # a template is a program: it may divide by zero
            message = str(error).strip() or type(error).__name__
            raise ConfigError(f"the chat template refuses the messages: {message:.300}") from None
        if size > longest:
            raise ConfigError(f"the chat template wrote {size} characters and did not end: it has a loop too many")
        return "".join(pieces)

    def takes_system(self) -> bool:
        """Whether a system message in front is written, and nothing refuses it."""
        system, user = sentinels(2)
        try:
            text = self.render([{"role": "system", "content": system}, {"role": "user", "content": user}], True)
        except ConfigError:
            return False
        return system in text

    def end_of_turn(self, controls: Iterable[str]) -> str | None:
        """The first of `controls` that the template writes after an assistant turn; None if it writes none.

        Some templates go on after it: `<|im_end|>` and a line feed, or the next header.
        """
        user, answer = sentinels(2)
        talk = [Message(role="user", content=user), Message(role="assistant", content=answer)]
        _, answered, rest = self.render(talk, False).rpartition(answer)
        match = literals(controls).search(rest) if answered else None
        if match is None:
            return None
        return match.group()

    def role_marks(self, tokens: Iterable[str]) -> set[str]:
        """Return those of `tokens` that the template writes around turns. Words and blanks are no marks."""
        roles = ("user", "assistant", "user")
        talk = [Message(role=role, content=text) for role, text in zip(roles, sentinels(3), strict=True)]
        try:
            text = self.render(talk, False)
        except ConfigError:
            return set()
        return {token for token in tokens if token.strip() and not token.strip().isalnum() and token in text}


def sentinels(count: int) -> list[str]:
    """Texts that stand for the content of messages: plain letters, so that no template changes them."""
    return [f"sentinel{letter * 8}text" for letter in "qxzk"[:count]]


def literals(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest where several fit; nothing if there is none."""
    ordered = sorted(set(texts) - {""}, key=lambda text: (-len(text), text))
    if not ordered:
        return re.compile(r"(?!)")
    first = "".join(sorted({re.escape(text[0]) for text in ordered}))
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, ordered))})")


# ---- the files of a model directory, read without its tokenizer


def read_template(directory: str | Path) -> str | None:
    """Return the chat template of a model directory: chat_template.jinja, else tokenizer_config.json's, else None.

    Of several in tokenizer_config.json: `default`.
    """
    path = Path(directory) / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = read_json(Path(directory) / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    if isinstance(value, str) and value:
        return value
    return None


def read_names(directory: str | Path) -> dict[str, str]:
    """Special tokens by name, as the directory's files give them."""
    directory = Path(directory)
    tokenizer_files = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    named = {name: _content(tokenizer_files.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in named.items() if text}


def read_controls(directory: str | Path) -> dict[str, int | None]:
    """Texts of the tokens that the directory's files call special, with their ids where the files give them."""
    settings = read_json(Path(directory) / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        entries = [entry | {"id": int(number)} for number, entry in decoder.items() if isinstance(entry, dict)]
    else:
        entries = added_tokens(Path(directory) / "tokenizer.json")
    ids: dict[str, int] = {str(entry["content"]): int(entry["id"]) for entry in entries}
    marked = [str(entry["content"]) for entry in entries if entry.get("special")]
    listed = [_content(token) or "" for token in settings.get("additional_special_tokens") or []]
    return {text: ids.get(text) for text in (*marked, *listed, *read_names(directory).values()) if text}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or another thing in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if isinstance(value, dict):
        return value
    return {}


def _content(token: Any) -> str | None:
    """The text of a token that is written as text or as {"content": text}."""
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str):
        return content
    return None
