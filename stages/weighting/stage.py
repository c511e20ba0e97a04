"""Stage - scored_pairs + models -> weighted_pairs: reference log-probs and a weight for every token, one pair per row.

All that the trainer needs is in the row, so it loads one model. First every model makes its pass, one model in memory
at a time, into the log-prob store; then the rows are put together, shard by shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ContractError
from data_contracts.rows import WeightedPairRow
from data_contracts.shard_rows import ShardRows
from data_contracts.shards import read_shard, read_shards, shard_path, shard_paths, to_table, write_shard
from stages.job import Job
from stages.models.families import attention_addition
from stages.models.lazy import import_auto_classes
from stages.models.turn_settings import TurnConfig
from stages.registry import Named
from stages.running.history import events
from stages.stage import StageRuntime
from stages.weighting.rows import is_identical
from stages.weighting.sources import Sources
from stages.weighting.teacher import SIDES
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import add_stats


class WeightingRuntime(StageRuntime):
    pairs_per_shard: int = Field(256, ge=1)
    """How much is lost, at most, when the stage is killed."""
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward."""
    packing: bool = True
    """Pack the passes of the student's models, as training packs the policy: in bf16 two layouts are two models. Set for
    you from the run's method and `training.runtime.packing`."""


class WeightingConfig(TurnConfig):
    """Per-token reference log-probs and per-token weights.

    How conversations become tokens (`template` to `special_tokens_in_data`) matters where a prompt is written anew: for
    a teacher, or under another system prompt. It is the sampler's then, and set for you from the run's `sampling`.
    """

    NEUTRAL: ClassVar[dict[str, Any]] = TurnConfig.NEUTRAL | {"template": "chat", "history": (), "quantised": False}

    weights: Annotated[Named, WEIGHTS] | None = None
    """Weight provider, e.g. {name: swift}. None: the method's own (ones for most)."""
    quantised: bool = False
    """Whether reference and policies are held in 4 bits (NF4), as training.adapter.name qlora trains them: their log-probs
    are of the function that is trained. Set by the run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes; the trainer's, or policy and reference differ before the first step."""
    reference: bool = True
    """Make the reference pass. Set for you from the method, as are the next five."""
    old_policy: bool = False
    """Also the pass of the policy that sampled the responses (GRPO)."""
    history: tuple[float, ...] = ()
    """Mix that pass with those of earlier policies: lambda of each, newest first. (): that policy alone (MNPO)."""
    teacher_tokens: bool = False
    """Also the responses as the teacher's tokenizer cuts them (KD, ULD)."""
    drop_identical: bool = True
    """Drop pairs whose two responses and weights are equal: they carry no gradient."""
    swap: bool = False
    """Exchange chosen and rejected: how TIS-DPO makes its negative model."""
    positive_system: str | None = None
    """TIS-DPO (P): score the responses under this system prompt for pi+."""
    negative_system: str | None = None
    """TIS-DPO (P): and under this one for pi-."""
    runtime: WeightingRuntime = WeightingRuntime()


Config = WeightingConfig


def key_additions(config: WeightingConfig, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """Before the turn contract, a teacher read the student's special tokens as text; then its template was not given
    the run's `template_kwargs`; and see `attention_addition`."""
    settings = config.weights or WEIGHTS.config("ones")
    needs = WEIGHTS.get(settings.name).needs(settings)
    has_teacher = config.teacher_tokens or bool(needs & {"teacher", "teacher_unshifted"})
    view = {"teacher_view": 3 if config.template_kwargs else 2} if has_teacher else {}
    return view | attention_addition(inputs.values())


def preload(config: WeightingConfig) -> None:
    """Import what `run` will; once for many stages, before any is forked (stages/forkserver.py)."""
    import_auto_classes()


def run(job: Job) -> None:
    """Make the passes that are missing, then the shards that are missing, and sum up.

    Raises: ConfigError for a model that is not given, ContractError for rows that cannot be trained on.
    """
    config: WeightingConfig = job.config
    settings = config.weights or WEIGHTS.config("ones")
    provider = WEIGHTS.get(settings.name)
    rows = ShardRows([job.path("pairs")], "scored_pairs")
    preferred_ids = "rejected_ids" if config.swap else "chosen_ids"
    if empty := [row["pair_id"] for row in rows if not row[preferred_ids]]:
        raise ContractError(f"scored_pairs {job.inputs['pairs'].key}: no token in {preferred_ids} of {empty[:3]}")
    sources = Sources(job, provider.needs(settings))
    size = config.runtime.pairs_per_shard
    with job.timed("passes"):
        sources.fill(rows, size)
    for index, chunk in job.missing_shards(rows, size, "weighted_pairs", beside=("dropped",)):
        pairs = sources.sided(chunk)
        weights, stats = sources.weights(pairs, provider, settings)
        weighted: list[WeightedPairRow] = []
        dropped: list[dict[str, str]] = []
        for row in sources.rows(pairs, weights):
            if config.drop_identical and is_identical(row):
                dropped.append({"prompt_id": row["prompt_id"], "reason": "chosen and rejected are the same"})
            else:
                weighted.append(row)
        job.event("stats", index=index, stats=stats)
        write_shard(shard_path(job.out, index, "dropped"), to_table(dropped, "dropped"))
        job.write(index, weighted)
    if not job.is_worker:
        job.metrics |= _summary(job.out, sources, len(rows))
        job.facts |= {"weights": settings.name, "weights_version": provider.VERSION}


def _summary(directory: Path, sources: Sources, rows_in: int) -> dict[str, float]:
    """Metrics of the finished artifact, shard by shard.

    Raises: ContractError if no pair is left, or if one is neither there nor dropped.
    """
    pairs = 0
    numbers = ("weights", "reference_logps")
    totals = {f"{side}_{name}": _Total() for side in SIDES for name in numbers}
    for path in shard_paths(directory, "weighted_pairs"):
        table = read_shard(path, "weighted_pairs")
        pairs += table.num_rows
        for name, total in totals.items():
            total.add(_flat(table, name))
    dropped = read_shards(directory, "dropped", "dropped")
    if pairs + dropped.num_rows != rows_in:
        raise ContractError(
            f"weighted_pairs {directory.name}: of {rows_in} scored pairs {pairs} were weighted and {dropped.num_rows} "
            "dropped: the others are lost. Remove the directory and run again"
        )
    if not pairs:
        raise ContractError(
            f"weighted_pairs {directory.name}: all {dropped.num_rows} pairs have equal responses, e.g. of the prompts "
            f"{dropped['prompt_id'].to_pylist()[:3]}: nothing to train on. A higher sampling.temperature gives more "
            "varied ones"
        )
    metrics: dict[str, float] = {"rows_in": rows_in, "pairs": pairs, "dropped": dropped.num_rows}
    for side in SIDES:
        weights, logps = (totals[f"{side}_{name}"] for name in numbers)
        metrics[f"tokens/{side}"] = weights.count
        if weights.count:
            metrics |= {
                f"weights/{side}/mean": weights.sum / weights.count,
                f"weights/{side}/min": weights.least,
                f"weights/{side}/max": weights.most,
            }
        if logps.count:
            metrics[f"mean_reference_logp/{side}"] = logps.sum / logps.count
    stats = {event["index"]: event["stats"] for event in events(directory) if event["event"] == "stats"}
    metrics |= {f"weights/{name}": value for name, value in add_stats(stats.values()).items()}
    return metrics | sources.cache_counts()


class _Total:
    """Sum, count and range of the numbers of a column, over all shards."""

    def __init__(self) -> None:
        self.sum, self.count, self.least, self.most = 0.0, 0, np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Count the numbers of one shard."""
        if len(values):
            self.sum += float(values.sum(dtype=np.float64))
            self.count += len(values)
            self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """All numbers of a per-token column."""
    return cast("pa.ListArray", table[name].combine_chunks()).flatten().to_numpy()
