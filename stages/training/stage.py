"""Stage - weighted_pairs + policy -> checkpoint: the next policy, in Hugging Face format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data_contracts.adapter import ADAPTER, adapter_in, write_base
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import check_model_directory
from data_contracts.errors import ConfigError, ContractError
from data_contracts.files import write_atomic
from data_contracts.shards import count_rows, read_shard, shard_paths
from data_contracts.store import Store
from stages.job import Job
from stages.methods import METHODS
from stages.models.families import attention_addition
from stages.models.lazy import import_auto_classes
from stages.models.policy import pick_device, pin_threads
from stages.registry import Named
from stages.running import rendezvous
from stages.running.cost import SPEED_EVENT, parameters
from stages.training.adapter import check_adapters
from stages.training.batches import MARGIN_AT_STEP_1, METRICS, STEPS, plan_steps
from stages.training.config import TrainingConfig, TrainingInputs
from stages.training.launch import error_of, start_ranks
from stages.training.speed import SPEEDS, train_flops

Config = TrainingConfig


def key_additions(config: TrainingConfig, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """The attention of the models (see `attention_addition`), and the rule of a warm-up, if there is one."""
    warmup = {"warmup": "first update moves"} if config.has_warmup else {}
    return warmup | attention_addition(inputs.values())


def preload(config: TrainingConfig) -> None:
    """Import what `run` will; once for many stages, before any is forked (stages/forkserver.py)."""
    import_auto_classes()
    if config.runtime.num_processes == config.runtime.num_nodes == 1:  # several ranks are interpreters of their own
        from stages.training.engine import import_deepspeed

        import_deepspeed(pick_device(config.runtime.device))


TOKENIZER_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Files copied from the policy to the checkpoint, beside those that have "token" in their name."""


def run(job: Job) -> None:
    """Train the policy and leave the checkpoint in `job.out`."""
    config: TrainingConfig = job.config
    shutil.rmtree(job.out / ".export", ignore_errors=True)
    check_adapters(config, job.inputs)
    world_size = config.runtime.num_processes * config.runtime.num_nodes
    if world_size == 1:
        metrics = train_rank(job.out, config, _inputs(job), job)
    else:
        metrics = _train_on_ranks(job)
    _adopt(job)
    _account(job)
    warn_of_first_margin(job, metrics)
    rows_in = sum(count_rows(job.path(name)) for name in ("pairs", "more_pairs") if name in job.inputs)
    job.metrics |= metrics | check_rows_trained(job.out, rows_in, config)
    job.facts |= {"device": pick_device(config.runtime.device), "world_size": world_size}
    if (adapter := adapter_in(job.out)) is not None:
        job.metrics["adapter_parameters"] = parameters(str(adapter))


def warn_of_first_margin(job: Job, metrics: Mapping[str, float]) -> None:
    """Say, in log and record, that policy and reference differ before the first update although they are one model."""
    margin, limit = metrics.get(MARGIN_AT_STEP_1, 0.0), job.config.runtime.max_first_margin
    pairs = Store(job.store_root).load("weighted_pairs", job.inputs["pairs"].key)
    reference = pairs.inputs.get("reference") if pairs else None
    if reference is None or reference.content != job.inputs["policy"].content or margin <= limit:
        return
    sentence = (
        f"before the first update the margin is {margin:.2f} nats on average, and policy and reference are one model: the "
        f"arithmetic of {job.config.dtype} tells them apart. Long responses do that; training.dtype: float32 does not "
        f"(training.runtime.max_first_margin is {limit:g})"
    )
    job.log(f"warning: {sentence}")
    job.facts["first_margin"] = sentence


def check_rows_trained(out: Path, rows_in: int, config: TrainingConfig) -> dict[str, float]:
    """Return the rows that were given and those that each epoch trained on, from the lines of metrics.jsonl.

    Raises: ContractError where an epoch trained on more or fewer rows than there are.
    """
    lines = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    plan = plan_steps(rows_in, config.batch_size, config.epochs, config.seed)
    for epoch in range(config.epochs):
        # Steps of a try that an older program began have no count of their own.
        trained = sum(line.get("rows", len(plan[line["step"] - 1].rows)) for line in lines if line["epoch"] == epoch)
        if trained != rows_in:
            raise ContractError(
                f"checkpoint {out.name}: epoch {epoch} trained on {trained} of {rows_in} rows: a step is missing in "
                f"{METRICS}, or was done twice. Remove the directory and run again"
            )
    return {"rows_in": rows_in, "rows_trained": rows_in}


def _inputs(job: Job) -> TrainingInputs:
    return TrainingInputs(**{name: str(job.path(name)) for name in TrainingInputs._fields if name in job.inputs})


def _account(job: Job) -> None:
    """Report the tokens of every sequence trained on, with its prompt, for the policy and the models beside it."""
    config: TrainingConfig = job.config
    sides = METHODS.get(config.method.name).sides(config.method)
    tokens = 0
    for name in ("pairs", "more_pairs"):
        if name not in job.inputs:
            continue
        for path in shard_paths(job.path(name), "weighted_pairs"):
            table = read_shard(path, "weighted_pairs")
            prompt_lengths = pc.list_value_length(table["prompt_ids"]).to_numpy()
            for side in sides:
                lengths = pc.list_value_length(table[f"{side}_ids"]).to_numpy()
                tokens += int((prompt_lengths + lengths)[lengths > 0].sum())
    job.used(job.path("policy"), tokens * config.epochs, per_token=train_flops(config))
    for role in ("reference", "teacher"):
        if role in job.inputs:
            job.used(job.path(role), tokens * config.epochs)


def train_rank(out: Path, config: TrainingConfig, inputs: TrainingInputs, job: Job | None) -> dict[str, float]:
    """Train as one rank; returns the metrics of the last epoch on the main rank. `job` is None on the other ranks."""
    from stages.training.bad_step import BadStep, save
    from stages.training.loop import train

    rows = inputs.rows()
    check_rows(rows, config.method, config.runtime.may_leave_a_side)
    pin_threads(max(1, len(os.sched_getaffinity(0)) // config.runtime.num_processes))

    def report(num_steps: int, total: int, metrics: dict[str, float]) -> None:
        if job is None:
            return
        shown = {
            name: metrics[key] for name, key in (("loss", "loss"), ("margin", "rewards/margins")) if key in metrics
        }
        values = "".join(f" {name} {value:.4f}" for name, value in shown.items())
        utilisation = f", MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
        rate = f"{metrics['tokens_per_second']:,.0f} tokens/s{utilisation}"
        job.log(f"step {num_steps}/{total}{values} {metrics['seconds']:.1f} s, {rate}")
        job.event("step", index=num_steps)
        job.progress(num_steps, total, "steps")

    device = pick_device(config.runtime.device)
    try:
        metrics = train(
            config, rows, inputs.policy, inputs.reference, inputs.teacher, out, device, report, inputs.start
        )
    except BadStep as bad:  # on every rank at once; the main rank writes it down
        if os.environ.get("RANK", "0") != "0":
            raise ContractError(bad.problem) from None
        raise save(bad, out, config, inputs, rows) from None
    speed = {name: metrics.pop(name) for name in SPEEDS if name in metrics}
    if job is not None:  # a cost, not a result: it is another one each time
        job.event(SPEED_EVENT, speed=speed)
    return metrics


def check_rows(rows: Sequence[dict[str, Any]], method: Named, may_leave_a_side: bool = False) -> None:
    """Check every per-token column that the method needs: present, as long as its tokens, and finite; that the method
    reads every response there is; and that some token has a weight.

    Raises: ContractError naming row and column.
    """
    if not rows:
        raise ContractError("weighted_pairs: no rows to train on")
    needs, sides = METHODS.get(method.name).needs(method), METHODS.get(method.name).sides(method)
    columns = ["weights"]
    if "reference" in needs:
        columns.append("reference_logps")
    if "old_policy" in needs:
        columns.append("old_logps")
    has_weight = False
    unread: set[str] = set() if may_leave_a_side else {"chosen", "rejected"} - set(sides)
    for number, row in enumerate(rows):
        for side in unread:
            if row.get(f"{side}_ids"):
                raise ContractError(
                    f"weighted_pairs row {number} (pair_id {row['pair_id']}) has a {side} response, which {method.name} "
                    "does not read: make rows of single responses (scoring.pairing each, truth or given_each)"
                )
        for side in sides:
            count = len(row[f"{side}_ids"])
            for name in columns:
                values = row[f"{side}_{name}"]
                where = f"weighted_pairs row {number} (pair_id {row['pair_id']}): {side}_{name}"
                if values is None or len(values) != count or not count:
                    raise ContractError(
                        f"{where} has {len(values or ())} values for {count} tokens. "
                        "Rebuild with `python -m stages weigh`"
                    )
                if not np.isfinite(values).all():
                    raise ContractError(f"{where} holds NaN or infinity. Rebuild with `python -m stages weigh`")
            has_weight = has_weight or np.any(row[f"{side}_weights"])
    if not has_weight:
        raise ContractError(
            f"weighted_pairs: the weight of every token of all {len(rows)} rows is 0, so no update would move the policy. "
            "Look at the metrics weights/* of the weigh stage, and at weighting.weights"
        )


def _train_on_ranks(job: Job) -> dict[str, float]:
    """Start this node's ranks, tell the other nodes where to meet, and wait; returns the main rank's metrics."""
    config: TrainingConfig = job.config
    work = {"config": config.model_dump(mode="json"), "inputs": _inputs(job)._asdict()}
    write_atomic(job.out / ".ranks.json", json.dumps(work))
    nodes = config.runtime.num_nodes
    with rendezvous.announce(job.out, nodes) as meeting:
        code = start_ranks(job.out, config.runtime, meeting, 0)
    if code:
        raise error_of(code)(
            f"training with {nodes * config.runtime.num_processes} ranks ended with code {code}; "
            f"the ranks' output is above, and in {job.out}/stage.log"
        )
    return json.loads((job.out / ".summary.json").read_text())


def take_part(config: TrainingConfig, out: Path, node: int) -> None:
    """Run the ranks of a node that is not the first; it writes nothing of the artifact.

    Raises: ConfigError for a node too many, the ranks' error if they fail.
    """
    if not 0 < node < config.runtime.num_nodes:
        raise ConfigError(
            f"this is node {node}, and training.runtime.num_nodes is {config.runtime.num_nodes}: "
            "start as many, counted from 0"
        )
    meeting = rendezvous.join(out)
    if code := start_ranks(out, config.runtime, meeting, node):
        raise error_of(code)(f"the ranks of node {node} ended with code {code}; their output is above")


def _adopt(job: Job) -> None:
    """Move the exported model into place; copy the policy's tokenizer, template and generation settings beside it."""
    export = job.out / ".export"
    shutil.rmtree(job.out / ADAPTER, ignore_errors=True)  # of a try that was killed here
    for path in sorted(export.iterdir()):
        os.replace(path, job.out / path.name)
    export.rmdir()
    for directory in (job.out, *sorted((job.out / STEPS).glob("*"))):
        for path in job.path("policy").iterdir():
            is_text = path.suffix in (".json", ".jinja", ".model", ".txt")
            if is_text and ("token" in path.name or path.name in TOKENIZER_FILES):
                shutil.copyfile(path, directory / path.name)
        if (adapter := adapter_in(directory)) is not None:
            write_base(adapter, job.inputs.get("start", job.inputs["policy"]).content)
        check_model_directory(directory, chat_template=False)
