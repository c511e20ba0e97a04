"""Contracts - the name of an artifact: a hash over stage, version, settings and the content of its inputs.

    key = sha256(canonical_json({stage, version, config without runtime, inputs: {name: content digest}}))[:16]

The key is a hash of the inputs, not of the output, because sampling on a GPU is not bit-reproducible. Inputs enter by
the digest of their *content*, so an artifact that was made again with equal bytes keeps everything downstream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from data_contracts.config import Config

KEY_LENGTH = 16


def canonical_json(value: Any) -> str:
    """Return the one text that stands for `value`: sorted keys, no spaces, exact floats.

    Raises: TypeError or ValueError for a value that another process would write differently.

    >>> canonical_json({"b": 1.0, "a": (True, None, 0.1)})
    '{"a":[true,null,0.1],"b":1}'
    """
    plain = _to_plain_data(value, "$")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _to_plain_data(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}: only finite numbers can be part of an identity")
        # 1.0 and 1 are the same setting: YAML writes either.
        is_whole = value.is_integer() and abs(value) < 2**53
        if is_whole:
            return int(value)
        return value
    if isinstance(value, list | tuple):
        return [_to_plain_data(item, f"{path}[{i}]") for i, item in enumerate(cast(Sequence[Any], value))]
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        for key in items:
            if not isinstance(key, str):
                raise TypeError(
                    f"{path} has the key {key!r} of type {type(key).__name__}: keys of an identity must be text"
                )
        return {key: _to_plain_data(item, f"{path}.{key}") for key, item in items.items()}
    # A permissive str() here would let a memory address into the key, which differs from process to process.
    raise TypeError(
        f"{path} is a {type(value).__name__}, which cannot be part of an identity; pass plain data or a Config"
    )


def fingerprint(stage: str, version: str, config: Config | Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the key of what `stage` makes from `inputs` (name -> content digest) under `config`: 16 hex digits.

    >>> fingerprint("sample", "1", {"seed": 0}, {"policy": "ab" * 32})
    '6ce9b361a3384553'
    """
    settings = config.identity() if isinstance(config, Config) else config
    body = {"stage": stage, "version": version, "config": settings, "inputs": inputs}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()[:KEY_LENGTH]


def digest_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
