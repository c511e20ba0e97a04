"""Tasks - prompt file -> prompts artifact: the part of the prompts that an iteration uses."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.identity import canonical_json, digest_text, fingerprint
from data_contracts.shards import shard_path, to_table, write_shard
from data_contracts.store import Store

VERSION = "1"


def part_of(
    rows: list[dict[str, Any]], iteration: int, iterations: int, per_iteration: int | None, reuse: bool, seed: int
) -> list[dict[str, Any]]:
    """The prompts of one iteration (from 0): a part of its own of the shuffled file (SPPO: a third each), or with
    `reuse` the same for all.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(rows))
    size = per_iteration or (len(rows) if reuse else len(rows) // iterations)
    start = 0 if reuse else iteration * size
    return [rows[i] for i in sorted(order[start : start + size])]


def prompts_key(rows: list[dict[str, Any]]) -> str:
    """Key of the prompts artifact that holds these rows."""
    return fingerprint("prompts", VERSION, _identity(rows), {})


def _identity(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {"rows": digest_text(canonical_json(rows))}


def publish(rows: list[dict[str, Any]], store: Store) -> ArtifactRef:
    """Write the rows as an artifact of their own content, or find it."""
    identity = _identity(rows)
    key = fingerprint("prompts", VERSION, identity, {})
    with store.lock("prompts", key):
        if existing := store.find("prompts", key):
            return existing
        directory = store.directory("prompts", key)
        write_shard(shard_path(directory, 0), to_table(rows, "prompts"))
        record = ArtifactRecord(
            kind="prompts",
            key=key,
            stage="prompts",
            version=VERSION,
            config=identity,
            inputs={},
            content="",
            files=[],
            rows=len(rows),
            provenance={"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        )
        return store.sign(record).ref(str(directory))
