"""Contracts - a model: where it comes from, and what its directory must hold before anything is loaded from it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from pydantic import field_validator, model_validator

from data_contracts.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_in, is_adapter_only, read_adapter_config
from data_contracts.artifact import EXTERNAL, ArtifactRef, FileDigest
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.identity import digest_file
from data_contracts.store import Store, content_digest

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
OPTIONAL_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
GIT_LFS = b"version https://git-lfs"
"""How the file that stands for a large one begins where Git LFS has not fetched it."""
CACHED_FROM_BYTES = 1 << 20
"""Smaller files are hashed again each time: that is faster than to look the digest up."""

_STORE: ContextVar[Store | None] = ContextVar("store_of_digests", default=None)


class ModelRef(Config):
    """A model in Hugging Face format: a local directory, or a hub id with the revision that pins it."""

    path: str | None = None
    """A directory with config.json, *.safetensors and a tokenizer."""
    hub_id: str | None = None
    """`owner/name` on the Hugging Face hub; fetched once, then read from the local cache."""
    revision: str | None = None
    """Commit, tag or branch of `hub_id`. Pin a commit if results are to be reproduced."""

    @field_validator("hub_id")
    @classmethod
    def _is_a_name(cls, hub_id: str | None) -> str | None:
        if hub_id is not None and not HUB_ID.fullmatch(hub_id):
            raise ValueError("a model of the hub is named owner/name, of letters, digits, dots, dashes and underscores")
        return hub_id

    @model_validator(mode="after")
    def _has_one_source(self) -> ModelRef:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give exactly one of `path` (a local directory) and `hub_id`")
        if self.revision is not None and self.hub_id is None:
            raise ValueError("`revision` goes with `hub_id`")
        return self


def weight_files(directory: Path) -> list[Path]:
    """Return the *.safetensors files of a model, those that its index names if it has one.

    Raises: ConfigError for an index that is damaged or names files elsewhere.
    """
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index} is not an index of weights ({type(error).__name__}: {error}); fetch it again"
        ) from None
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigError(f"{index} names files outside of the model directory, e.g. {outside[0]!r}")
    return [directory / name for name in names]


def check_model_directory(directory: Path | str, chat_template: bool = True) -> None:
    """Check that the directory holds all that an engine reads; no tensor is read.

    Engines hide what is missing: they replace a missing tokenizer by an invented one, missing tensors by random
    numbers.
    Raises: ConfigError naming what is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"the model directory {directory} does not exist. Give `path:` of a Hugging Face directory, or `hub_id:`"
        )
    _check_architecture(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{directory} has no tokenizer file (tokenizer.json): an engine would invent one in silence")
    if chat_template and not has_chat_template(directory):
        raise ConfigError(
            f"the model in {directory} has no chat template (chat_template.jinja or `chat_template` in "
            "tokenizer_config.json), and chat prompts need one. "
            "Use an instruct model, or set `sampling.template: plain`"
        )
    for name in OPTIONAL_JSON_FILES:
        _check_json_object(directory / name)
    files = weight_files(directory)
    if (adapter := adapter_in(directory)) is not None and is_adapter_only(directory):
        read_adapter_config(adapter)
        files = [adapter / ADAPTER_WEIGHTS]
    if not (directory / WEIGHTS_INDEX).is_file() and len(files) > 1 and not (directory / WEIGHTS).is_file():
        raise ConfigError(
            f"{directory} has {len(files)} weight files and no {WEIGHTS_INDEX}: nothing says which tensor is where; fetch "
            "the index too"
        )
    if not files:
        raise ConfigError(f"{directory} has no *.safetensors weights (pickled .bin files are not read)")
    for path in files:
        check_safetensors(path)


def _check_architecture(directory: Path) -> None:
    try:
        config: Any = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        if (directory / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{directory} holds an adapter and no model: merge it into its base model and give that directory"
            ) from None
        raise ConfigError(f"{directory} has no config.json: not a Hugging Face model directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{directory}/config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not cast(dict[str, Any], config).get("architectures"):
        raise ConfigError(f"{directory}/config.json names no `architectures`: cannot tell which model class to load")


def _check_json_object(path: Path) -> None:
    if not path.is_file():
        return
    try:
        kind, _ = _type_and_added_tokens(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; fetch it again") from None
    if kind != "dict":
        raise ConfigError(f"{path} must hold a JSON object, got {kind}; fetch it again")


def added_tokens(path: Path) -> list[dict[str, Any]]:
    """Return the entries of `added_tokens` in a tokenizer.json; none where there is no such file, or another thing in it."""
    try:
        return _type_and_added_tokens(path.read_bytes())[1]
    except (OSError, ValueError, RecursionError):
        return []


@lru_cache(maxsize=4)
def _type_and_added_tokens(content: bytes) -> tuple[str, list[dict[str, Any]]]:
    """Return the name of the type that a JSON text in UTF-8 holds, and its entry `added_tokens`.

    Cached by content: a tokenizer.json has megabytes, is read several times, and all checkpoints of a run have the same.
    Raises: ValueError, RecursionError.
    """
    # Of bytes, json would guess the encoding; engines read UTF-8 alone.
    value: Any = json.loads(content.decode("utf-8"))
    kind = type(value).__name__
    entries: Any = cast(dict[str, Any], value).get("added_tokens") if kind == "dict" else None
    return kind, cast(list[dict[str, Any]], entries) if isinstance(entries, list) else []


def check_safetensors(path: Path) -> None:
    """Check that a file is as long as its header says. Raises: ConfigError."""
    try:
        size = path.stat().st_size
        expected_size = _safetensors_size(path, size)
    except (
        OSError, ValueError, struct.error, AttributeError, TypeError, KeyError, IndexError, RecursionError
    ) as error:  # fmt: skip
        raise ConfigError(f"{path} is not a readable safetensors file ({error})") from None
    if size != expected_size:
        raise ConfigError(
            f"{path} has {size} bytes, its header promises {expected_size}: "
            "the file is truncated or damaged; fetch it again"
        )


def _safetensors_size(path: Path, size: int) -> int:
    """Return the size that the header promises: 8 bytes of length, the header, the tensors up to the last offset."""
    with open(path, "rb") as file:
        start = file.read(len(GIT_LFS))
        if start == GIT_LFS:
            raise ValueError("it is a Git LFS pointer: fetch the file itself with `git lfs pull`")
        file.seek(0)
        (header_size,) = struct.unpack("<Q", file.read(8))
        if header_size >= size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(file.read(header_size))
    last_offset = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if not isinstance(last_offset, int):
        raise TypeError("an offset is not a whole number")
    return 8 + header_size + last_offset


def header_of(path: Path) -> str:
    """Return the header of a safetensors file that `check_safetensors` has passed: JSON, tensor name -> dtype, shape,
    place."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size).decode()


def has_chat_template(directory: Path) -> bool:
    """Return whether the tokenizer in the directory can format a chat."""
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        settings: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
        return bool(settings.get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def external_model(directory: Path, cache: Path | None = None) -> ArtifactRef:
    """Return the reference to a model that the user brought: named by the content of its files, wherever they lie.

    cache: a directory that remembers digests by size, inode and change time, so that a large model is hashed once
    """
    directory = directory.resolve()
    paths = sorted(directory.iterdir())
    if (adapter := adapter_in(directory)) is not None and is_adapter_only(directory):
        paths += sorted(adapter.iterdir())
    files = [
        _digest(path, path.relative_to(directory).as_posix(), cache)
        for path in paths
        if path.is_file() and path.suffix in MODEL_SUFFIXES
    ]
    return ArtifactRef(kind="checkpoint", key=EXTERNAL, path=str(directory), content=content_digest(files))


@contextmanager
def digests_kept_in(store: Store) -> Generator[None]:
    """Let `model_content` remember the digests of large files in `store`, once that exists.

    Settings that name a model enter a key by the model's content, and settings know no store: whoever computes a key
    says which store.
    """
    token = _STORE.set(store)
    try:
        yield
    finally:
        _STORE.reset(token)


def model_content(directory: Path) -> str:
    """Return the digest over a model's files. Outside of `digests_kept_in` every call reads all of them."""
    store = _STORE.get()
    if store is None or not store.root.is_dir():  # computing a key makes no store
        return external_model(directory).content
    return external_model(directory, store.root / "digests").content


def _digest(path: Path, name: str, cache: Path | None) -> FileDigest:
    stat = path.stat()
    if cache is None or stat.st_size < CACHED_FROM_BYTES:
        return FileDigest(name=name, size=stat.st_size, sha256=digest_file(path))
    entry = cache / f"{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"
    if entry.is_file() and re.fullmatch("[0-9a-f]{64}", cached := entry.read_text(errors="replace")):
        return FileDigest(name=name, size=stat.st_size, sha256=cached)
    sha256 = digest_file(path)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(entry, sha256)
    return FileDigest(name=name, size=stat.st_size, sha256=sha256)
