"""python -m flows.forecast.plan RUN.yaml [--set section.field=value ...]: what runs where, does it fit, what helps.

Paper and pencil: no model is loaded, no GPU is touched, nothing is written. Exit codes: 0 it fits, 2 it does not (or
the request is wrong).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data_contracts.checkpoint import ModelRef
from data_contracts.config import Config
from data_contracts.errors import ConfigError, PipelineError, print_error
from data_contracts.words import plural
from flows.config import RunConfig, load_run
from flows.forecast.memory import (
    GIB,
    Shape,
    generate_memory,
    model_shape,
    pass_memory,
    rows_of,
    scorer_memory,
    training_memory,
    vllm_memory,
    with_slack,
)
from stages.scoring.models import DEFAULT_TOKENS, GPU_TOKENS
from stages.scoring.pairing import PAIRINGS
from stages.stage import STAGES

Parts = dict[str, int]


class Need(NamedTuple):
    """What one stage asks of each of its ranks."""

    stage: str
    models: str
    workers: int
    gpus: int
    """Of one worker on one node; 0: it runs on the CPU."""
    nodes: int
    device: Parts
    """Bytes by purpose on each GPU (of each rank where there is none)."""
    host: Parts
    """Bytes of host memory on each node beyond that."""

    @property
    def device_bytes(self) -> int:
        return with_slack(self.device) if self.gpus else sum(self.device.values())


class Hardware(NamedTuple):
    nodes: int
    gpus_per_node: int
    gpu_bytes: float
    host_bytes: float


class Line(NamedTuple):
    need: Need
    problem: str | None
    help: tuple[str, ...]


def hardware(run: RunConfig) -> Hardware:
    """What the run config says there is; what it does not say is looked up on this machine."""
    execution = run.execution
    has_unknown_size = execution.gpu_memory_gib is None and execution.gpus_per_node != 0
    gpu_sizes = _gpus_here() if execution.gpus_per_node is None or has_unknown_size else []
    count = len(gpu_sizes) if execution.gpus_per_node is None else execution.gpus_per_node
    if count and execution.gpu_memory_gib is None and not gpu_sizes:
        raise ConfigError(
            f"execution.gpus_per_node is {count}, and this machine shows no GPU to take the size from: "
            "set execution.gpu_memory_gib"
        )
    memory = (execution.gpu_memory_gib or 0) * GIB
    if execution.gpu_memory_gib is None and gpu_sizes:
        memory = min(gpu_sizes)
    host = (execution.host_memory_gib or 0) * GIB
    if not execution.host_memory_gib:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(execution.nodes, count, memory, host)


def _gpus_here() -> list[float]:
    """Bytes of memory of each GPU that this machine shows."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(line) * 2**20 for line in process.stdout.split()]


def model_shapes(run: RunConfig) -> dict[str, Shape]:
    """The shapes of all models of a run, by role. Raises: ConfigError for one whose size cannot be known."""
    refs: dict[str, ModelRef] = {"policy": run.policy}
    refs |= {role: model for role in run.roles if (model := getattr(run.models, role)) is not None}
    if isinstance(run.reference, ModelRef):
        refs["reference"] = run.reference
    for name, scorer in (
        ("scorer", run.scoring.scorer if PAIRINGS.get(run.pairing).needs_scores else None),
        ("judge", run.evaluation.scorer),
    ):
        model = getattr(scorer, "model", None)
        if isinstance(model, ModelRef):
            refs[name] = model
    return {role: model_shape(model) for role, model in refs.items()}


def stage_memory(run: RunConfig, shapes: dict[str, Shape] | None = None, gpus_per_node: int = 1) -> dict[str, Need]:
    """Bytes per rank of every stage, from the settings and the models' shapes (`model_shapes`, unless given).

    gpus_per_node 0: everything runs on the CPU.
    """
    shapes = shapes or model_shapes(run)
    policy, sampling, execution = shapes["policy"], run.sampling, run.execution
    prompt, response = sampling.max_prompt_tokens, sampling.max_new_tokens
    needs_of_rows = PAIRINGS.get(run.pairing)
    if needs_of_rows.texts or needs_of_rows.is_single:
        response = max(response, run.scoring.max_response_tokens)
    if (total := run.scoring.max_total_tokens) is not None:
        # The longest row is a given response that fills the whole beside one that is as long as its side may be.
        response = min(total - 1, sampling.max_new_tokens if needs_of_rows.candidates else response)
        prompt = total - response
    sides = len(run.spec.sides(run.method))

    def need(stage: str, settings: Any, models: str, device: Parts, host: Parts, nodes: int = 1) -> Need:
        gpus = execution.gpus_of(stage, settings) if gpus_per_node else 0
        return Need(stage, models, execution.workers_of(stage), gpus, nodes, device, host)

    needs: dict[str, Need] = {}
    needs["sample"] = need("sample", sampling, "policy", _sampling(sampling, policy, gpus_per_node), {})
    if "scorer" in shapes:
        budget = run.scoring.runtime.batch_tokens or (GPU_TOKENS if gpus_per_node else DEFAULT_TOKENS)
        device = scorer_memory(
            run.scoring.scorer, shapes["scorer"], rows_of(budget, prompt, response, 2), gpus_per_node > 0
        )
        needs["score"] = need("score", run.scoring, "scorer", device, {})
    rows = rows_of(run.weighting.runtime.batch_tokens, prompt, response, 1)
    passed = {role: shape for role, shape in shapes.items() if role not in ("scorer", "judge")}
    heaviest = max(passed, key=lambda role: sum(pass_memory(passed[role], run.training.dtype, rows).values()))
    needs["weigh"] = need(
        "weigh",
        run.weighting,
        f"{heaviest} (the largest of {len(passed)})",
        pass_memory(passed[heaviest], run.training.dtype, rows),
        {},
    )
    needs["train"] = _training(run, shapes, rows_of(run.training.runtime.batch_tokens, prompt, response, sides), need)
    if run.warm_start is not None:
        warm_start = stage_memory(run.warm_start_run(), shapes, gpus_per_node)["train"]
        if warm_start.device_bytes > needs["train"].device_bytes:
            needs["train"] = warm_start._replace(models="policy (warm start)")
    rows = rows_of(run.evaluation.runtime.batch_tokens, prompt, run.sampling_for_heldout().max_new_tokens, 1)
    judged = {"policy": pass_memory(policy, "bfloat16", rows)}
    if "judge" in shapes:
        judged["judge"] = scorer_memory(run.evaluation.scorer, shapes["judge"], rows, gpus_per_node > 0)
    name = max(judged, key=lambda role: sum(judged[role].values()))
    needs["evaluate"] = need("evaluate", run.evaluation, name, judged[name], {})
    return needs


def _sampling(sampling: Any, policy: Shape, gpus_per_node: int) -> Parts:
    backend, context = sampling.backend, sampling.context_tokens
    if backend.name == "vllm" and gpus_per_node:
        return vllm_memory(policy, context, backend.runtime.tensor_parallel_size, 1)
    if backend.name == "vllm":
        return vllm_memory(policy, context, 1, 0) | {"kv cache": int(backend.runtime.kv_cache_gib * GIB)}
    if backend.name == "transformers":
        return generate_memory(policy, backend.dtype, context, backend.runtime.batch_size)
    return {}


def _training(run: RunConfig, shapes: dict[str, Shape], rows: Any, need: Any) -> Need:
    runtime = run.training.runtime
    others = [("reference", shapes.get("reference", shapes["policy"]))] if run.live_reference else []
    if run.training.adapter is not None:  # the policy with its adapter off: no weights of its own
        others = [(name, shape._replace(parameters=0)) for name, shape in others]
    if "teacher_logits" in run.spec.needs(run.method):
        others.append(("teacher", shapes["teacher"]))
    ranks = runtime.num_processes * runtime.num_nodes
    device, host = training_memory(
        shapes["policy"], run.training, rows, ranks, runtime.num_processes, tuple(shape for _, shape in others)
    )
    names = " + ".join(["policy", *(name for name, _ in others)])
    return need("train", run.training, names, device, host, runtime.num_nodes)


def check(need: Need, have: Hardware, utilisation: float = 1.0) -> str | None:
    """Why a stage cannot run on the hardware, or None."""
    if need.gpus > have.gpus_per_node:
        return f"one worker asks for {need.gpus} GPUs on a node, and no node has more than {have.gpus_per_node}"
    if need.nodes > have.nodes:
        return f"it asks for {need.nodes} nodes, and there are {have.nodes}"
    host = sum(need.host.values())
    if need.gpus and need.device_bytes > have.gpu_bytes * utilisation:
        return f"{need.device_bytes / GIB:.1f} GiB on each GPU, which has {have.gpu_bytes * utilisation / GIB:.1f}"
    if not need.gpus:
        host += need.device_bytes
    if host > 0.95 * have.host_bytes:
        return f"{host / GIB:.1f} GiB of host memory on a node, which has {have.host_bytes / GIB:.1f}"
    return None


def plan(run: RunConfig) -> list[Line]:
    """Every stage with its need, why it does not fit if it does not, and which settings would make it fit."""
    shapes, have = model_shapes(run), hardware(run)
    lines = []
    for stage, need in stage_memory(run, shapes, have.gpus_per_node).items():
        problem = check(need, have, _utilisation(run, stage))
        lines.append(Line(need, problem, tuple(_what_helps(run, stage, shapes, have)) if problem else ()))
    return lines


NOTHING_HELPS = "no setting here makes it fit: take GPUs or nodes with more memory, more of them, or a smaller model"


def _advice(helpful: Sequence[str]) -> str:
    """What follows a problem: settings to try, or that none helps."""
    return f"; {NOTHING_HELPS}" if NOTHING_HELPS in helpful else f". Try {'; or '.join(helpful)}"


def _utilisation(run: RunConfig, stage: str) -> float:
    """Part of a GPU's memory that the stage may take: an engine reserves its own."""
    runtime = getattr(run.sampling.backend, "runtime", None)
    return getattr(runtime, "gpu_memory_utilization", 1.0) if stage == "sample" else 1.0


def _what_helps(run: RunConfig, stage: str, shapes: dict[str, Shape], have: Hardware) -> Iterator[str]:
    """Settings that make the stage fit: every single one that does, else the first combination."""

    def fits(changes: dict[str, Any]) -> bool:
        changed = _changed(run, changes)
        return (
            check(stage_memory(changed, shapes, have.gpus_per_node)[stage], have, _utilisation(changed, stage)) is None
        )

    knobs = list(_knobs(run, stage, have))
    # The mildest setting of each knob that is enough.
    enough = [next((changes for changes in group if fits(changes)), None) for group in knobs]
    if helpful := [changes for changes in enough if changes is not None]:
        yield from map(_words, helpful)
        return
    changes: dict[str, Any] = {}
    for group in knobs:
        changes |= group[-1]
        if fits(changes):
            yield _words(changes)
            return
    yield NOTHING_HELPS


def _knobs(run: RunConfig, stage: str, have: Hardware) -> Iterator[list[dict[str, Any]]]:
    """Groups of changes, each from mild to strong."""
    section = STAGES[stage].section
    if stage == "sample":
        parallel = [2**power for power in range(1, 4) if 2**power <= have.gpus_per_node]
        if parallel and run.sampling.backend.name == "vllm":
            yield [{"sampling.backend.runtime.tensor_parallel_size": count} for count in parallel]
        if run.sampling.backend.name == "transformers":
            yield [{"sampling.backend.runtime.batch_size": size} for size in (16, 8, 4, 1)]
        return
    if stage == "train":
        runtime = run.training.runtime
        if not runtime.gradient_checkpointing:
            yield [{"training.runtime.gradient_checkpointing": True}]
        highest = 3 if run.training.adapter is None else 2
        if runtime.zero_stage < highest and runtime.num_processes * runtime.num_nodes > 1:
            yield [{"training.runtime.zero_stage": level} for level in range(runtime.zero_stage + 1, highest + 1)]
        more = [2**power for power in range(1, 4) if runtime.num_processes < 2**power <= have.gpus_per_node]
        if more:
            yield [
                {"training.runtime.num_processes": count, "training.runtime.zero_stage": max(1, runtime.zero_stage)}
                for count in more
            ]
        if not runtime.offload_optimizer:
            yield [
                {"training.runtime.offload_optimizer": True, "training.runtime.zero_stage": max(1, runtime.zero_stage)}
            ]
    tokens = getattr(getattr(run, section).runtime, "batch_tokens", None)
    if tokens is None and stage == "score":
        tokens = GPU_TOKENS
    if tokens:
        yield [{f"{section}.runtime.batch_tokens": size} for size in _halves(tokens)]
    if stage == "train":
        nodes = [count for count in (2, 4, 8, 16) if run.training.runtime.num_nodes < count <= have.nodes]
        if nodes and run.training.adapter is None:
            yield [{"training.runtime.num_nodes": count, "training.runtime.zero_stage": 3} for count in nodes]


def _halves(tokens: int) -> list[int]:
    sizes = []
    while tokens > 512:
        tokens //= 2
        sizes.append(tokens)
    return sizes or [tokens]


def _words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}".replace("True", "true") for name, value in changes.items())


def _changed(config: Config, changes: dict[str, Any]) -> Any:
    """The config with settings replaced by dotted name; unchecked, for a question only."""
    for dotted, value in changes.items():
        head, _, rest = dotted.partition(".")
        new = _changed(getattr(config, head), {rest: value}) if rest else value
        config = config.model_copy(update={head: new})
    return config


def refuse_what_cannot_fit(run: RunConfig) -> list[Line]:
    """The plan. Raises: ConfigError naming every stage that does not fit, and what would help."""
    lines = plan(run)
    if problems := [line for line in lines if line.problem]:
        raise ConfigError(
            f"{run.name}: {plural(len(problems), 'stage')} without enough memory\n"
            + "\n".join(f"  {line.need.stage}: {line.problem}{_advice(line.help)}" for line in problems)
        )
    return lines


def show(run: RunConfig, lines: list[Line], have: Hardware) -> str:
    """The plan as text."""
    gpus = f"{have.gpus_per_node} x {have.gpu_bytes / GIB:.0f} GiB GPU" if have.gpus_per_node else "no GPU"
    nodes = f"{plural(have.nodes, 'node')} with {gpus} and {have.host_bytes / GIB:.0f} GiB of memory"
    head = f"{'stage':9} {'where':26} {'GiB each':>8}  made of (GiB)"
    out = [f"{run.name}: profile {run.execution.profile}; {nodes}", head]
    for need, problem, _ in lines:
        unit = plural(need.workers, "worker") if need.nodes == 1 else plural(need.nodes, "node")
        where = f"{unit} x " + (f"{need.gpus} GPU" if need.gpus else "CPU")
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.device.items() if size >= 0.05 * GIB)
        host = "".join(
            f", {name} {size / GIB:.0f} on the host"
            for name, size in need.host.items()
            if size >= 0.5 * GIB and need.gpus
        )
        verdict = f"   DOES NOT FIT: {problem}" if problem else ""
        out.append(
            f"{need.stage:9} {where:26} {need.device_bytes / GIB:8.1f}  {need.models}: "
            f"{parts or 'little'}{host}{verdict}"
        )
    return "\n".join(out)


def main(arguments: list[str]) -> int:
    from flows.config import parse_assignment

    parser = argparse.ArgumentParser(
        prog="python -m flows.forecast.plan", description="What will run where, and whether it fits."
    )
    parser.add_argument("config", help="run config, e.g. deploy/runs/swift.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="section.field=value", dest="overrides")
    options = parser.parse_args(arguments)
    try:
        run = load_run(options.config, dict(parse_assignment(text) for text in options.overrides))
        print(show(run, plan(run), hardware(run)))
        refuse_what_cannot_fit(run)
    except PipelineError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
