"""Stages - the one way to build an artifact: check the inputs, hold its lock, run the stage, sign the record."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_contracts import lease
from data_contracts.artifact import EXTERNAL, ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import digests_kept_in, external_model
from data_contracts.config import Config
from data_contracts.errors import ArtifactError
from data_contracts.lease import LockOwner
from data_contracts.ledger import SESSION
from data_contracts.set_aside import set_files_aside
from data_contracts.shards import count_rows
from data_contracts.store import Store, data_files, remove_litter
from stages.job import Job
from stages.running.claims import Claims, forget
from stages.running.cost import MemoryWatch, cost_of, loading
from stages.running.gpus import GPU_EVENT, torch_peaks
from stages.running.hardware import hardware
from stages.running.history import events, seconds_of
from stages.stage import Stage

CHANGES_NUMBERS = re.compile(
    r"(NVIDIA_TF32|TORCH_ALLOW_TF32|TORCH_BLAS|CUBLAS_|CUDNN_|MKL_|ONEDNN_|DNNL_|OMP_NUM|VLLM_(ATTENTION|USE|CPU)|HF_HUB_OFF)"
)
"""Names of environment variables that choose arithmetic, kernels or the number of threads; kept in the record."""
LOCK_HELD = "SELFPLAY_LOCK_HELD"
"""Environment variable: kind-key of the artifact whose lock the launcher already holds for this process."""
REMOTE = "SELFPLAY_REMOTE"
"""Environment variable: the launcher is on another machine, so its lock cannot be inherited."""


def execute(
    stage: Stage, config: Config, inputs: Mapping[str, ArtifactRef], store: Store, launched: float | None = None
) -> ArtifactRecord:
    """Return the record of the artifact, built unless it exists. The caller may hold its lock already (see LOCK_HELD).

    launched: when the process began (seconds since the epoch), so that importing libraries counts as start-up. None:
        now.
    """
    stage.check_inputs(inputs)
    key = stage.key(config, inputs)
    name = f"{stage.produces}-{key}"
    is_remote = bool(os.environ.get(REMOTE))
    if os.environ.get(LOCK_HELD) == name and not is_remote:
        return _build(stage, config, inputs, store, key, launched)

    def waiting(owner: LockOwner) -> None:
        print(f"{name} is being built by {owner}: waiting", flush=True)

    # On another machine than the launcher's, builders keep apart by a lock of their own.
    lock_key = f"{key}-remote" if is_remote else key
    with store.lock(stage.produces, lock_key, waiting):
        if store.find(stage.produces, key) and (record := store.load(stage.produces, key)):
            print(f"{stage.produces} {key} is already built", flush=True)
            return record
        return _build(stage, config, inputs, store, key, launched)


def execute_share(stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], store: Store, worker: str) -> None:
    """Make shards of the artifact, beside other workers, until none is left.

    Nothing is signed: whoever started the workers does that.
    """
    stage.check_inputs(inputs)
    _check_inputs_are_there(stage, inputs)
    key = stage.key(config, inputs)
    out = store.directory(stage.produces, key)
    # Under leases no flock tells whether the launcher lives.
    claims = Claims(out, worker, None if lease.is_enabled() else store.lock_path(stage.produces, key))
    job = Job(stage, config, inputs, out, claims)
    job.event("worker")
    loading.seconds = 0.0
    try:
        stage.load().run(job)
    except BaseException as error:
        claims.failed(error)
        raise
    finally:
        job.event("seconds", what="load", seconds=loading.seconds)
        if peaks := torch_peaks():
            job.event(GPU_EVENT, peaks=peaks)


def _check_inputs_are_there(stage: Stage, inputs: Mapping[str, ArtifactRef]) -> None:
    for name, ref in inputs.items():
        if not Path(ref.path).is_dir():
            raise ArtifactError(
                f"the input {name!r} of the stage {stage.name} is gone: no directory {ref.path}. Run again: "
                "it is built anew"
            )


def _build(
    stage: Stage, config: Any, inputs: Mapping[str, ArtifactRef], store: Store, key: str, launched: float | None
) -> ArtifactRecord:
    _check_inputs_are_there(stage, inputs)
    out = store.directory(stage.produces, key)
    out.mkdir(parents=True, exist_ok=True)
    remove_litter(out)
    job = Job(stage, config, inputs, out)
    job.event("start", launched=launched or time.time())
    loading.seconds = 0.0
    with MemoryWatch() as watch:
        stage.load().run(job)
    job.event("seconds", what="load", seconds=loading.seconds)
    if peaks := torch_peaks():
        job.event(GPU_EVENT, peaks=peaks)
    job.event("end")
    history = events(out)
    _refuse_changed_inputs(stage, config, inputs, store, key)
    forget(out)
    record = ArtifactRecord(
        kind=stage.produces,
        key=key,
        stage=stage.name,
        version=stage.version,
        config=stage.settings(config, inputs),
        inputs=dict(inputs),
        content="",
        files=[],
        rows=count_rows(out),
        metrics=job.metrics,
        facts=job.facts,
        seconds=seconds_of(history),
        cost=cost_of(history, watch),
        provenance=provenance(config, history),
    )
    signed = store.sign(record)
    # After the signature: a kill in between costs the clean-up (the next look does it), not the training.
    shutil.rmtree(out / "resume", ignore_errors=True)
    return signed


def _refuse_changed_inputs(
    stage: Stage, config: Config, inputs: Mapping[str, ArtifactRef], store: Store, key: str
) -> None:
    """Take the digests of the user's models again, those of inputs and those that the settings name.

    Raises: ArtifactError if one was overwritten while the stage read it. What was made of two models is set aside, so
    that nobody goes on from it.
    """
    changed = [
        f"{name} ({ref.path})"
        for name, ref in inputs.items()
        if ref.key == EXTERNAL and external_model(Path(ref.path), store.root / "digests").content != ref.content
    ]
    with digests_kept_in(store):
        if not changed and stage.key(config, inputs) != key:
            changed.append("a model that the settings name")
    if not changed:
        return
    out = store.directory(stage.produces, key)
    why = f"while the stage {stage.name} read it, the files of {', '.join(changed)} were overwritten"
    aside = set_files_aside(store.root, out, data_files(out), why, by="a build")
    raise ArtifactError(
        f"{why}: nothing is signed, what was made lies in {aside}. Run again once the model is complete"
    )


def _environment() -> dict[str, str]:
    """Return the variables of this process that may change a number and are in no key."""
    return {name: value for name, value in sorted(os.environ.items()) if CHANGES_NUMBERS.match(name)}


def provenance(config: Config, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return who built the artifact, when and on which host, with library versions. Never part of a key."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "hardware": hardware(),
        "session": os.environ.get(SESSION, ""),
        "python": platform.python_version(),
        "argv": sys.argv,
        "starts": sum(event["event"] == "start" for event in history),
        "settings": config.model_dump(mode="json"),
        "environment": _environment(),
        "versions": {
            name: getattr(module, "__version__", "?")
            for name in ("torch", "transformers", "vllm", "deepspeed", "lm_eval", "pyarrow")
            if (module := sys.modules.get(name))
        },
    }
