"""Contracts - the name of an artifact: a hash over stage, version, settings and the content of its inputs.

    key = sha256(canonical_json({stage, version, config without runtime, inputs: {name: content digest}}))[:16]

Input-addressed, because sampling on a GPU is not bit-reproducible; inputs enter by the digest of their *content*, so an artifact that
was made again with equal bytes keeps everything downstream.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_contracts.config import Config

KEY_LENGTH = 16


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, exact floats. Raises TypeError/ValueError on what would not reproduce."""
    return json.dumps(_plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}: only finite numbers can be part of an identity")
        # 1.0 and 1 mean the same setting; YAML writes either.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"{path} has the key {key!r} of type {type(key).__name__}: keys of an identity must be text"
                )
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    # A permissive str() here would let a memory address into the key and fork identity between processes.
    raise TypeError(
        f"{path} is a {type(value).__name__}: not something an identity can be made of; pass plain data or a Config"
    )


def fingerprint(stage: str, version: str, config: Config | Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of what `stage` makes from `inputs` (name -> content digest) under `config`; 16 hex digits."""
    settings = config.identity() if isinstance(config, Config) else config
    body = {"stage": stage, "version": version, "config": settings, "inputs": inputs}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()[:KEY_LENGTH]


def digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
