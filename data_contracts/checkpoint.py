"""Contracts - a model: where it comes from, and what its directory must hold before anything is loaded from it."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pydantic import model_validator

from data_contracts.artifact import ArtifactRef, FileDigest
from data_contracts.config import Config
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.identity import digest_file
from data_contracts.store import Store, content_digest

WEIGHTS_INDEX = "model.safetensors.index.json"
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
_STORE: ContextVar[Store | None] = ContextVar("store_of_digests", default=None)


class ModelRef(Config):
    """A model in Hugging Face format: a local directory, or a hub id with the revision that pins it."""

    path: str | None = None
    """A directory with config.json, *.safetensors and a tokenizer."""
    hub_id: str | None = None
    """`owner/name` on the Hugging Face hub; fetched once, then read from the local cache."""
    revision: str | None = None
    """Commit, tag or branch of `hub_id`. Pin a commit if results are to be reproduced."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelRef:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give exactly one of `path` (a local directory) and `hub_id`")
        if self.revision is not None and self.hub_id is None:
            raise ValueError("`revision` goes with `hub_id`")
        return self


def weight_files(directory: Path) -> list[Path]:
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{index} is not an index of weights ({type(error).__name__}: {error}); fetch it again"
            ) from None
        if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise ConfigError(f"{index} names files outside of the model directory, e.g. {outside[0]!r}")
        return [directory / name for name in names]
    return sorted(directory.glob("*.safetensors"))


def check_model_directory(directory: Path | str, chat_template: bool = True) -> None:
    """Everything a reader of the directory will need is there; no tensor is read.

    Catches what engines swallow: a missing tokenizer is silently replaced by an invented one, missing tensors by random numbers.
    Raises: ConfigError naming what is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"the model directory {directory} does not exist. Give `path:` of a Hugging Face directory, or `hub_id:`"
        )
    try:
        config = json.loads((directory / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no config.json: not a Hugging Face model directory") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{directory}/config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ConfigError(f"{directory}/config.json names no `architectures`: cannot tell which model class to load")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{directory} has no tokenizer file (tokenizer.json): an engine would invent one in silence")
    if chat_template and not has_chat_template(directory):
        raise ConfigError(
            f"the model in {directory} has no chat template (chat_template.jinja or `chat_template` in tokenizer_config.json), and chat prompts need one. "
            "Use an instruct model, or set `sampling.template: plain`"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        _check_json(directory / name)
    files = weight_files(directory)
    if not files:
        raise ConfigError(f"{directory} has no *.safetensors weights (pickled .bin files are not read)")
    for path in files:
        check_safetensors(path)


def _check_json(path: Path) -> None:
    if not path.is_file():
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}; fetch it again")


def check_safetensors(path: Path) -> None:
    """The file is as long as its header says. Raises: ConfigError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if not isinstance(end, int):
            raise TypeError("an offset that is no number")
    except (
        OSError,
        ValueError,
        struct.error,
        AttributeError,
        TypeError,
        KeyError,
        IndexError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error})") from None
    if size != 8 + length + end:
        raise ConfigError(
            f"{path} has {size} bytes, its header promises {8 + length + end}: the file is truncated or damaged; fetch it again"
        )


def has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def external_model(directory: Path, cache: Path | None = None) -> ArtifactRef:
    """A model the user brought, as an input: addressed by the content of its files, wherever it lies.

    `cache` (a directory) remembers digests by size, inode and change time, so that a large model is hashed once.
    """
    directory = directory.resolve()
    files = [
        _digest(path, path.relative_to(directory).as_posix(), cache)
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in MODEL_SUFFIXES
    ]
    return ArtifactRef(kind="checkpoint", key="external", path=str(directory), content=content_digest(files))


@contextmanager
def digests_kept_in(store: Store) -> Iterator[None]:
    """Inside, `model_content` remembers digests of large files in this store, once the store exists.

    Settings that name a model enter a key by the model's content, and settings know no store: whoever computes a key says which one.
    """
    token = _STORE.set(store)
    try:
        yield
    finally:
        _STORE.reset(token)


def model_content(directory: Path) -> str:
    """The digest over a model's files. Outside of `digests_kept_in` every call reads all of them."""
    store = _STORE.get()
    remembers = store is not None and store.root.is_dir()  # computing a key makes no store
    return external_model(directory, store.root / "digests" if remembers else None).content


def _digest(path: Path, name: str, cache: Path | None) -> FileDigest:
    stat = path.stat()
    if cache is None or stat.st_size < 1 << 20:
        return FileDigest(name=name, size=stat.st_size, sha256=digest_file(path))
    memo = cache / f"{stat.st_dev:x}-{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{stat.st_ctime_ns:x}"
    if memo.is_file() and re.fullmatch("[0-9a-f]{64}", known := memo.read_text(errors="replace")):
        return FileDigest(name=name, size=stat.st_size, sha256=known)
    sha256 = digest_file(path)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, sha256)
    return FileDigest(name=name, size=stat.st_size, sha256=sha256)
