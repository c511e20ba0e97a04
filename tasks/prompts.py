"""Tasks - prompts -> prompts artifact: the part of them that an iteration uses."""

from __future__ import annotations

import time

import numpy as np

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.identity import fingerprint
from data_contracts.shards import shard_path, write_shard
from data_contracts.store import Store
from tasks.data.prompt_set import PromptSet

VERSION = "1"


def part_of(
    prompts: PromptSet, iteration: int, iterations: int, per_iteration: int | None, reuse: bool, seed: int
) -> PromptSet:
    """The prompts of one iteration (from 0): a part of its own of the shuffled set (SPPO: a third each), or with
    `reuse` the same for all.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(prompts))
    size = per_iteration or (len(prompts) if reuse else len(prompts) // iterations)
    start = 0 if reuse else iteration * size
    return prompts.take(np.sort(order[start : start + size]))


def prompts_key(prompts: PromptSet) -> str:
    """Key of the prompts artifact that holds these rows."""
    return fingerprint("prompts", VERSION, {"rows": prompts.digest}, {})


def publish(prompts: PromptSet, store: Store) -> ArtifactRef:
    """Write the rows as an artifact of their own content, or find it."""
    identity = {"rows": prompts.digest}
    key = fingerprint("prompts", VERSION, identity, {})
    with store.lock("prompts", key):
        if existing := store.find("prompts", key):
            return existing
        directory = store.directory("prompts", key)
        write_shard(shard_path(directory, 0), prompts.table())
        record = ArtifactRecord(
            kind="prompts",
            key=key,
            stage="prompts",
            version=VERSION,
            config=identity,
            inputs={},
            content="",
            files=[],
            rows=len(prompts),
            metrics=dict(prompts.counts),
            provenance={"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")},
        )
        return store.sign(record).ref(str(directory))
