"""Stage - weighted_pairs + policy -> checkpoint: the next policy, in Hugging Face format."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from data_contracts.checkpoint import check_model_directory
from data_contracts.config import Config as BaseConfig
from data_contracts.errors import BY_NAME, ConfigError, ContractError, PipelineError, StageError, TransientError
from data_contracts.files import write_atomic
from data_contracts.shards import ShardRows, read_shards
from stages.job import Job
from stages.methods import METHODS
from stages.models.policy import pick_device, pin_threads
from stages.registry import Named
from stages.running import rendezvous
from stages.running.cost import TRAIN
from stages.stage import StageRuntime
from stages.training.batches import STEPS


class TrainingRuntime(StageRuntime):
    num_processes: int = Field(1, ge=1)
    """Ranks on each machine; more than one are started by the `deepspeed` launcher (gloo on the CPU, nccl on GPUs)."""
    num_nodes: int = Field(1, ge=1)
    """Machines with `num_processes` ranks each; the same command runs on each of them (docs/cluster.md)."""
    collective_timeout_seconds: float = Field(1800, gt=0)
    """How long a rank waits for the others in one operation before it gives up. Loading and checkpoints happen between, so minutes are many."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: 1 cuts the optimizer state over the ranks, 2 the gradients too, 3 the weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory (ZeRO 1-3)."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens per micro-batch: the memory dial. One pair at least."""
    packing: bool = True
    """Compute the prompt once for chosen and rejected, and no padding, where model and method allow it. Moves the last bits of a loss."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more work, far less memory."""
    save_every_steps: int = Field(100, ge=1)
    """How many steps are lost, at most, when training is killed."""


class TrainingConfig(BaseConfig):
    """Optimisation. Vetted (SPPO, SPIN): RMSprop, lr 5e-7, batch 64, linear with 10 % warm-up, clip 1."""

    NEUTRAL: ClassVar[dict[str, Any]] = {"checkpoints": ()}

    method: Annotated[Named, METHODS] = Field(default_factory=lambda: METHODS.config("sppo"), validate_default=True)
    """The loss, by name, with its settings. Set for you from the run's `method`."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak rate."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(64, ge=1)
    """Pairs per optimizer step, over all ranks and micro-batches."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    schedule_epochs: int | None = Field(None, ge=1)
    """Epochs that the schedule is laid out for, where fewer are run (SPPO's paper: 18, of which the first). None: `epochs`."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Part of the steps in which the rate rises from 0."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm; 0: never."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic; bfloat16 keeps float32 master weights."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights of the checkpoint. bfloat16 is half the size, and rounds away updates of less than 0.4 %."""
    seed: int = 0
    """Order of the pairs."""
    checkpoints: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Also keep the policy after these parts of the steps, in `steps/`; the run goes on from the one that measures best (SPPO's rule)."""
    runtime: TrainingRuntime = TrainingRuntime()


Config = TrainingConfig


def run(job: Job) -> None:
    config: TrainingConfig = job.config
    shutil.rmtree(job.out / ".export", ignore_errors=True)
    alone = config.runtime.num_processes * config.runtime.num_nodes == 1
    metrics = train_rank(job.out, config, _inputs(job), job) if alone else _launch(job)
    _adopt(job)
    _account(job)
    job.metrics |= metrics
    job.facts |= {
        "device": pick_device(config.runtime.device),
        "world_size": config.runtime.num_processes * config.runtime.num_nodes,
    }


def _account(job: Job) -> None:
    """Tokens of every sequence trained on, prompts counted once for each, and the passes of the models that stand beside the policy."""
    config: TrainingConfig = job.config
    sides = METHODS.get(config.method.name).sides(config.method)
    tokens = 0
    for name in ("pairs", "more_pairs"):
        if name in job.inputs:
            table = read_shards(job.path(name), "weighted_pairs")
            lengths = {
                column: table[column].combine_chunks().value_lengths().to_numpy()
                for column in ("prompt_ids", "chosen_ids", "rejected_ids")
            }
            tokens += sum(
                int((lengths["prompt_ids"] + lengths[f"{side}_ids"])[lengths[f"{side}_ids"] > 0].sum())
                for side in sides
            )
    job.used(job.path("policy"), tokens * config.epochs, per_token=TRAIN)
    for beside in ("reference", "teacher"):
        if beside in job.inputs:
            job.used(job.path(beside), tokens * config.epochs)


def _inputs(job: Job) -> dict[str, str | None]:
    return {
        name: str(job.path(name)) if name in job.inputs else None
        for name in ("pairs", "more_pairs", "policy", "reference", "teacher")
    }


def train_rank(out: Path, config: TrainingConfig, inputs: dict[str, str | None], job: Job | None) -> dict[str, float]:
    """What every rank does; `job` reports, and is there on the main rank only."""
    from stages.training.bad_step import BadStep, save
    from stages.training.loop import train

    rows = ShardRows([inputs[name] for name in ("pairs", "more_pairs") if inputs[name]], "weighted_pairs")
    check_rows(rows, config.method)
    pin_threads(max(1, len(os.sched_getaffinity(0)) // config.runtime.num_processes))

    def report(done: int, total: int, metrics: dict[str, float]) -> None:
        if job:
            shown = "".join(
                f" {name} {metrics[key]:.4f}"
                for name, key in (("loss", "loss"), ("margin", "rewards/margins"))
                if key in metrics
            )
            job.log(f"step {done}/{total}{shown} {metrics['seconds']:.1f} s")
            job.event("step", index=done)
            job.progress(done, total, "steps")

    models = [inputs[name] for name in ("policy", "reference", "teacher")]
    try:
        return train(config, rows, *models, out, pick_device(config.runtime.device), report)
    except BadStep as bad:  # on every rank at once; the main one writes it down
        raise (
            save(bad, out, config, inputs, rows) if os.environ.get("RANK", "0") == "0" else ContractError(bad.wrong)
        ) from None


def check_rows(rows: Sequence[dict[str, Any]], method: Any) -> None:
    """Every per-token column that the method needs is there, as long as its tokens, and finite. Raises: ContractError, row and column."""
    if not rows:
        raise ContractError("weighted_pairs: no rows to train on")
    needs, sides = METHODS.get(method.name).needs(method), METHODS.get(method.name).sides(method)
    columns = ["weights"] + ["reference_logps"] * ("reference" in needs) + ["old_logps"] * ("old_policy" in needs)
    for number, row in enumerate(rows):
        for side in sides:
            count = len(row[f"{side}_ids"])
            for name in columns:
                values = row[f"{side}_{name}"]
                where = f"weighted_pairs row {number} (pair_id {row['pair_id']}): {side}_{name}"
                if values is None or len(values) != count or not count:
                    raise ContractError(
                        f"{where} has {0 if values is None else len(values)} values for {count} tokens. Rebuild with `python -m stages weigh`"
                    )
                if not np.isfinite(values).all():
                    raise ContractError(f"{where} holds NaN or infinity. Rebuild with `python -m stages weigh`")


def _launch(job: Job) -> dict[str, float]:
    """Start this node's ranks with the deepspeed launcher and wait for them; on the first node, after telling the others where to meet."""
    work = job.out / ".ranks.json"
    write_atomic(work, json.dumps({"config": job.config.model_dump(mode="json"), "inputs": _inputs(job)}))
    nodes = job.config.runtime.num_nodes
    with rendezvous.announce(job.out, nodes) as meeting:
        code = start_ranks(job.out, job.config, meeting, 0)
    if code:
        raise _failure(code)(
            f"training with {nodes * job.config.runtime.num_processes} ranks ended with code {code}; the ranks' output is above, and in {job.out}/stage.log"
        )
    return json.loads((job.out / ".summary.json").read_text())


def take_part(config: TrainingConfig, out: Path, node: int) -> None:
    """What a node does that is not the first: its ranks, where the first one says to meet; nothing of the artifact is written here."""
    if not 0 < node < config.runtime.num_nodes:
        raise ConfigError(
            f"this is node {node}, and training.runtime.num_nodes is {config.runtime.num_nodes}: start as many, counted from 0"
        )
    meeting = rendezvous.join(out)
    if code := start_ranks(out, config, meeting, node):
        raise _failure(code)(f"the ranks of node {node} ended with code {code}; their output is above")


def _failure(code: int) -> type[PipelineError]:
    """What the ranks' exit code means: what a rank said of itself, or a signal (of which the launcher makes 256 - number; 255 says nothing)."""
    if 256 - signal.NSIG < code < 255:
        return TransientError
    return next((kind for kind in BY_NAME.values() if kind.exit_code == code), StageError)


def start_ranks(out: Path, config: TrainingConfig, meeting: Any, node: int) -> int:
    """The exit code of this node's ranks."""
    count, nodes = config.runtime.num_processes, config.runtime.num_nodes
    world = {f"node{number}": list(range(count)) for number in range(nodes)}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    # The per-node launcher itself: the `deepspeed` command execs it after looking at the node's GPUs.
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={node}"]
    command += [f"--master_addr={meeting.address}", f"--master_port={meeting.port}", "--no_local_rank"]
    command += ["--module", "stages.training.rank", str(out)]
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if pick_device(config.runtime.device) == "cpu" else {})
    environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // count))
    return subprocess.run(command, env=environment, check=False).returncode


def _adopt(job: Job) -> None:
    """Move the exported model into place; every checkpoint gets the policy's tokenizer, template and generation settings as they are."""
    export = job.out / ".export"
    for path in sorted(export.iterdir()):
        os.replace(path, job.out / path.name)
    export.rmdir()
    for directory in (job.out, *sorted((job.out / STEPS).glob("*"))):
        for path in job.path("policy").iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and ("token" in path.name or path.name in KEPT):
                shutil.copyfile(path, directory / path.name)
        check_model_directory(directory, chat_template=False)


KEPT = (
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
