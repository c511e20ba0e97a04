"""Contracts - the redactor: recognises secrets and masks them in every output.

Errors, logs, records of a run, reports, Prefect and MLflow go through it.

A secret is known by its value (an environment variable whose name says so, a password in an address that the
environment holds) or by its shape (`user:password@` in an address, a Bearer token, a key in a query).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import IO, Any, cast
from urllib.parse import quote, unquote

MASK = "***"
NAME = re.compile(
    r"KEY(?!BOARD|MAP|RING)|TOKEN(?!IZ|S($|_))|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(^|_)(AUTH|PAT)($|_)",
    re.IGNORECASE,
)
"""Names of environment variables, and of fields of a query, whose values are nobody's business."""
SHORTEST = 6
"""Characters of a value below which it is no secret: its text would be found everywhere."""

_CREDENTIALS = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)(?:([^\s"'<>/@:]*):[^\s"'<>]*|[^\s"'<>/@:]+)@""")
"""`scheme://user:password@`, up to the last @ of the word: a password may hold a slash, a colon or an @."""
_SHAPES = (
    re.compile(r"""([?&;][\w.-]*(?:key|token|secret|password|signature|credential|sig)[\w.-]*=)[^&;\s"'<>\\]+""", re.I),
    re.compile(r"\b(Bearer\s+)(?=[A-Za-z0-9._~+/=-]*\d|[A-Za-z0-9._~+/=-]{20})[A-Za-z0-9._~+/=-]{6,}", re.I),
    re.compile(r"\b(Authorization['\"]?\s*[:=]\s*['\"]?(?:Basic|Digest|Token)\s+)[^\s'\"]+", re.I),
    re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|AKIA)[A-Za-z0-9_-]{16,}"),
)


def is_secret_name(name: str) -> bool:
    """Return whether the value of a variable or field of this name is to be hidden.

    >>> [is_secret_name(name) for name in ("HF_TOKEN", "api_key", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")]
    [True, True, False, False]
    """
    return NAME.search(name) is not None


def has_credentials(text: str) -> bool:
    """Return whether a text holds an address with a user or password, or anything else that has the shape of a secret.

    >>> has_credentials("http://me:pw@proxy:3128"), has_credentials("http://proxy:3128")
    (True, False)
    """
    return redact_shapes(text) != text


def redact(text: str) -> str:
    """Return the text with `***` in place of every secret.

    >>> redact("cannot reach s3://me:sec/ret@bucket: Bearer abc123def456")
    'cannot reach s3://me:***@bucket: Bearer ***'
    """
    text = redact_shapes(text)
    for value in _secrets(tuple(os.environ.items())):
        if value in text:
            text = text.replace(value, f":{MASK}@" if value[0] + value[-1] == ":@" else MASK)
    return text


def redact_shapes(text: str) -> str:
    """Return the text with `***` in place of what has the shape of a secret, whatever the environment holds."""
    if "://" in text:
        text = _CREDENTIALS.sub(_without_password, text)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{MASK}", text)
    return text


def redact_value(value: Any) -> Any:
    """Return a copy of nested dicts, lists and texts with every text redacted, and with the values of variables hidden
    whose names are those of secrets.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {name: MASK if _is_secret_variable(name) else redact_value(item) for name, item in items}
    if isinstance(value, (list, tuple)):
        return [redact_value(item) for item in cast("list[Any]", value)]
    return value


def secret_in(settings: Any, name: str = "") -> str:
    """Return the dotted name of the first setting that holds a secret, "" if none does: a variable whose name says so
    (`env: {HF_TOKEN: ...}`, `export HF_TOKEN=...`), an address with a password, the value of a secret of the
    environment.

    >>> secret_in({"env": {"HTTPS_PROXY": "http://me:pw@proxy"}}), secret_in({"env": {"HF_HOME": "/data"}})
    ('env.HTTPS_PROXY', '')
    """
    if isinstance(settings, Mapping):
        for key, value in cast(Mapping[Any, Any], settings).items():
            inner = f"{name}.{key}" if name else str(key)
            if _is_secret_variable(key) and value:
                return inner
            if dotted_name := secret_in(value, inner):
                return dotted_name
    elif isinstance(settings, (list, tuple)):
        for number, value in enumerate(cast("list[Any]", settings)):
            if dotted_name := secret_in(value, f"{name}.{number}"):
                return dotted_name
    elif isinstance(settings, str):
        assigned = any(is_secret_name(match[1]) for match in _ASSIGNMENT.finditer(settings))
        if assigned or redact(settings) != settings:
            return name
    return ""


def without_secrets(env: dict[str, str]) -> dict[str, str]:
    """Return environment settings as they are. Raises: ValueError if one holds a secret."""
    for name, value in env.items():
        if is_secret_name(name) or secret_in({name: value}):
            raise ValueError(
                f"{name} looks like a secret, or holds a password, and settings are written to records, logs and "
                "MLflow: remove it from `env` and export it in the shell; every stage inherits it"
            )
    return env


_ASSIGNMENT = re.compile(r"(?:^|[\s;,=])([A-Z][A-Z0-9_]*)=(?!\$)[^\s,;]")
"""`NAME=value` in a line of a shell or an option; `NAME=$OTHER` holds no value."""


def _is_secret_variable(name: Any) -> bool:
    """Whether this is the name of an environment variable (capitals) that holds a secret."""
    return isinstance(name, str) and re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is not None and is_secret_name(name)


def _without_password(match: re.Match[str]) -> str:
    scheme, user = match.groups()
    if user is None:
        return f"{scheme}{MASK}@"
    return f"{scheme}{user}:{MASK}@"


@lru_cache(maxsize=8)
def _secrets(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return the secret values of an environment in all their spellings, longest first."""
    values: set[str] = set()
    in_addresses: set[str] = set()
    for name, value in environment:
        if is_secret_name(name) and not os.path.exists(value):  # HF_TOKEN_PATH is no secret
            values.add(value.strip())
        for match in _CREDENTIALS.finditer(value):
            password = match.group().partition("://")[2].removesuffix("@").partition(":")[2]
            values |= {password, unquote(password)}
            in_addresses |= {f":{password}@"} - {":@"}  # known in this place however short it is
    values = {value for value in values if len(value) >= SHORTEST}
    spellings = values | {quote(value, safe="") for value in values} | {json.dumps(value)[1:-1] for value in values}
    return (*sorted(spellings, key=len, reverse=True), *in_addresses)


class _RedactingStream:
    """A text stream that hides secrets in whatever is written to it; everything else is the stream's own."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """Hide secrets in all further output of this process, tracebacks and other libraries' logs included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _RedactingStream):
            setattr(sys, name, _RedactingStream(stream))
    factory = logging.getLogRecordFactory()
    if getattr(factory, "is_redacting", False):
        return

    def make_record(*args: Any, **keywords: Any) -> logging.LogRecord:
        record = factory(*args, **keywords)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # a library's own mistake: its handler reports it
            return record
        redacted = redact(message)
        if redacted != message:
            record.msg, record.args = redacted, None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return record

    make_record.is_redacting = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_record)
