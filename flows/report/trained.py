"""Flows - what of an iteration's data trained, from the records of its stages: counts, and why the rest did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import pyarrow.parquet as pq

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.shards import read_columns, shard_paths
from tasks.build import Built


class Source(NamedTuple):
    """What an iteration had of one source."""

    prompts: int
    pairs: int
    """Pairs or single answers to these prompts that reached the trainer."""


class Trained(NamedTuple):
    """How much of an iteration's data trained."""

    counts: Mapping[str, int] = {}
    """What was counted -> how many, from the prompts to the optimizer's steps."""
    dropped: Mapping[str, float] = {}
    """Reason -> count, of prompts, pairs and candidates."""
    sources: Mapping[str, Source] = {}
    """By the prompts' source; {} where all of them are of one."""


def trained(stages: Mapping[str, Built]) -> Trained:
    """Return how much of an iteration's data trained, from its artifacts by the name of their stage."""
    chain = [built.record for name, built in stages.items() if built.record.stage == name and name != "train"]
    last_of = {record.stage: record for record in chain}
    prompts = next((record.inputs["prompts"] for record in chain if "prompts" in record.inputs), None)
    sources = _by_source(prompts, stages["weigh"].ref) if prompts and "weigh" in stages else {}
    steps = stages["train"].record.metrics if "train" in stages else {}
    counts = {
        "prompts": _rows_of(prompts) if prompts else None,
        "candidates": last_of["sample"].rows if "sample" in last_of else None,
        "pairs made": _metric(last_of.get("score"), "pairs"),
        "pairs to train on": _metric(last_of.get("weigh"), "pairs"),
        "trained": steps.get("rows_trained"),
        "steps": steps.get("steps"),
    }
    whole = {name: int(count) for name, count in counts.items() if count is not None}
    return Trained(whole, drop_reasons(chain), sources)


def drop_reasons(records: Iterable[ArtifactRecord]) -> dict[str, float]:
    """Reasons and counts, as the stages' records say: what was dropped, and what spoilt a candidate."""
    reasons: dict[str, float] = {}
    for record in records:
        for name, count in record.metrics.items():
            kind, _, reason = name.partition("/")
            if kind in ("dropped", "spoilt") and reason and count:
                reasons[f"{record.stage}: {reason}"] = reasons.get(f"{record.stage}: {reason}", 0.0) + count
        if record.stage == "weigh" and record.metrics.get("dropped"):
            reasons["weigh: equal responses"] = record.metrics["dropped"]
    return reasons


def _metric(record: ArtifactRecord | None, name: str) -> float | None:
    return record.metrics.get(name) if record else None


def _rows_of(prompts: ArtifactRef) -> int:
    return sum(pq.read_metadata(path).num_rows for path in shard_paths(prompts.path, "prompts"))


def _by_source(prompts: ArtifactRef, weighted: ArtifactRef) -> dict[str, Source]:
    """Return what there was of each source; {} where all prompts are of one."""
    paths = shard_paths(prompts.path, "prompts")
    tables = [read_columns(path, ["prompt_id", "source"]) for path in paths]
    if len({source for table in tables for source in table["source"].unique().to_pylist()}) < 2:
        return {}
    source_of: dict[str, str] = {}
    for table in tables:
        ids, names = (cast("list[str]", table[name].to_pylist()) for name in ("prompt_id", "source"))
        source_of |= zip(ids, names, strict=True)
    num_prompts = Counter(source_of.values())
    num_pairs: Counter[str] = Counter()
    for path in shard_paths(weighted.path, "weighted_pairs"):
        ids = cast("list[str]", read_columns(path, ["prompt_id"])["prompt_id"].to_pylist())
        num_pairs.update(source_of[prompt_id] for prompt_id in ids if prompt_id in source_of)
    return {source: Source(count, num_pairs[source]) for source, count in num_prompts.items()}
