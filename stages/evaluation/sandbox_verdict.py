"""Stages - the verdict on a program, made outside of the process that runs it. Standard library only.

`answer` runs the program and then answers calls: the name of a function and its arguments in, the result out. `judge`
runs the test in another process; where the test names something that the program defines, it gets a `Remote`, which
calls. Between them go lines of JSON: numbers, texts, lists, tuples, sets and dicts by value, all else as a number that
stands for the object (a handle). So a test compares data of its own process: an object that equals everything, a
raised exception of any name, or a walk through frames decides nothing. A program may still answer a call by whatever
it likes, which is what it is tested for.

    {"names": {name: value}} | {"error": [type, text]}                  the program's first line
    {"call": handle, "args": [...], "kwargs": {...}}                    the test's lines
    {"value": value, "args": [...]} | {"error": [type, text]}           the answers; args: as the call left them
"""

from __future__ import annotations

import builtins
import importlib
import json
import numbers
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import BufferedRWPair
from types import CodeType, ModuleType
from typing import Any, NoReturn

PASSED, FAILED = "+", "-"
"""First character of the verdict; after FAILED stands the name of the exception."""
LONGEST_LINE = 1 << 24


class EndedEarlyError(Exception):
    """The program's process is gone."""


class ProgramError(Exception):
    """The program raised something of its own."""


class Remote:
    """An object of the program's process, by its number there. Calling it calls it there."""

    def __init__(self, number: int, link: Link):
        self.number, self.link = number, link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.link.call(self, args, kwargs)


class Link:
    """The test's end of the line to the program."""

    def __init__(self, connection: socket.socket):
        self.file = connection.makefile("rwb")

    def receive(self) -> dict[str, Any]:
        """The next line. Raises: EndedEarlyError, and what the program raised."""
        message = _receive(self.file)
        if message is None:
            raise EndedEarlyError
        if "error" in message:
            name, text = map(str, message["error"])
            raise _exception(name, text)
        return message

    def call(self, remote: Remote, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an object of the program. Lists, sets and dicts among the arguments are as the call left them."""
        _send(self.file, {"call": encode(remote), "args": encode(list(args)), "kwargs": encode(kwargs)})
        answer = self.receive()
        for before, after in zip(args, decode(answer["args"], self), strict=True):
            if type(before) is type(after) is list:
                before[:] = after
            elif type(before) is type(after) and isinstance(before, (set, dict)):
                before.clear()
                before.update(after)
        return decode(answer["value"], self)


def judge(test: str, connection: socket.socket) -> str:
    """The verdict on the program at the other end: PASSED, or FAILED with the name of an exception ("" if it ended)."""
    sys.set_int_max_str_digits(0)
    try:
        link = Link(connection)
        defined = link.receive()["names"]
        code = compile(test, "test", "exec")
        # What the test defines or Python itself provides is not the program's to change.
        needed = {name for name in _names(code) if name in defined and not hasattr(builtins, name)}
        exec(code, {name: decode(defined[name], link) for name in needed})
    except EndedEarlyError:
        return FAILED
    except BaseException as error:
        return FAILED + type(error).__name__
    return PASSED


def answer(program: str, connection: socket.socket) -> NoReturn:
    """Run the program, then answer calls until the other end is closed."""
    sys.set_int_max_str_digits(0)
    file, objects, space = connection.makefile("rwb"), list[Any](), dict[str, Any]()
    try:
        exec(compile(program, "program", "exec"), space)
    except BaseException as error:
        _send(file, _error(error))
        os._exit(0)
    defined = {name: value for name, value in space.items() if not name.startswith("__")}
    _send(file, {"names": {name: encode(value, objects) for name, value in defined.items()}})
    while request := _receive(file):
        try:
            args, kwargs = decode(request["args"], objects), decode(request["kwargs"], objects)
            value = decode(request["call"], objects)(*args, **kwargs)
            _send(file, {"value": encode(value, objects), "args": encode(args, objects)})
        except BaseException as error:
            _send(file, _error(error))
    os._exit(0)


def encode(value: Any, objects: list[Any] | None = None) -> Any:
    """A value as JSON. What is no plain data is added to `objects` and encoded as its number there.

    Raises: TypeError for such a value if there is no list.

    >>> encode({"a": [1, (2.5, None)]})
    {'d': [['a', [1, {'t': [2.5, None]}]]]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Number):
        return _encode_number(value, objects)
    if isinstance(value, list):
        return [encode(item, objects) for item in value]
    if isinstance(value, dict):
        return {"d": [[encode(key, objects), encode(item, objects)] for key, item in value.items()]}
    for kind, mark in ((tuple, "t"), (set, "s"), (frozenset, "f")):
        if isinstance(value, kind):
            return {mark: [encode(item, objects) for item in value]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if isinstance(value, ModuleType) and value.__name__ in sys.stdlib_module_names:
        return {"m": value.__name__}
    return _handle(value, objects)


def _encode_number(value: Any, objects: list[Any] | None) -> Any:
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and (isinstance(value, float) or not isinstance(value, numbers.Rational)):
        return float(value)
    if isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real):
        number = complex(value)
        return {"c": [number.real, number.imag]}
    return _handle(value, objects)  # a Fraction, a Decimal


def _handle(value: Any, objects: list[Any] | None) -> dict[str, int]:
    if isinstance(value, Remote):
        return {"h": value.number}
    if objects is None:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the program")
    objects.append(value)
    return {"h": len(objects) - 1}


def decode(data: Any, other: list[Any] | Link) -> Any:
    """The value of `encode`. other: the program's objects, or the link to them, for handles."""
    if isinstance(data, list):
        return [decode(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    ((mark, content),) = data.items()
    if mark == "d":
        return {decode(key, other): decode(item, other) for key, item in content}
    if mark in "tsf":
        return {"t": tuple, "s": set, "f": frozenset}[mark](decode(item, other) for item in content)
    if mark == "b":
        return bytes.fromhex(content)
    if mark == "c":
        return complex(*content)
    if mark == "m" and content in sys.stdlib_module_names:
        return importlib.import_module(content)
    if mark != "h":
        raise ValueError(mark)
    return Remote(int(content), other) if isinstance(other, Link) else other[content]


def _names(code: CodeType) -> Iterator[str]:
    """All names that a piece of code looks up, in functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _exception(name: str, text: str) -> Exception:
    """An exception of Python's own as itself, any other as a ProgramError of that name."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # a UnicodeDecodeError takes more than a text
            return kind(text)
    return type(name, (ProgramError,), {})(text)


def _error(error: BaseException) -> dict[str, list[str]]:
    try:
        text = str(error)[:1000]
    except BaseException:
        text = ""
    return {"error": [type(error).__name__[:100], text]}


def _send(file: BufferedRWPair, message: dict[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def _receive(file: BufferedRWPair) -> dict[str, Any] | None:
    """The next line, None at the end. Raises: ValueError for what is no message."""
    line = file.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message
