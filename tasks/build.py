"""Tasks - find an artifact, or launch its stage, watch it and verify the result. Does not import Prefect."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import digests_kept_in
from data_contracts.config import Config
from data_contracts.errors import ArtifactError, NewerRecordError, StageError, TransientError
from data_contracts.files import disk_errors_explained, write_atomic
from data_contracts.mirror import Mirror, mirror_from_environment
from data_contracts.repair import repair_from_inputs, set_damaged_aside
from data_contracts.store import Store
from stages.stage import STAGES
from tasks.execution.config import ExecutionConfig
from tasks.execution.share import run_work
from tasks.launch import Progress
from tasks.place import LOCAL


class Built(NamedTuple):
    """A stage's artifact."""

    ref: ArtifactRef
    signed: ArtifactRecord | None
    """Its record; None in a rehearsal, if the artifact is not built."""
    cached: bool
    """Whether it existed before."""
    waited: float = 0.0
    """Seconds during which another run was building it."""

    @property
    def record(self) -> ArtifactRecord:
        assert self.signed is not None, f"{self.ref} is not built"
        return self.signed


def build(
    stage_name: str,
    config: Config,
    inputs: Mapping[str, ArtifactRef],
    store: Store,
    log: Callable[[str], None] = print,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    execution: ExecutionConfig = LOCAL,
) -> Built:
    """Return the artifact of a stage: found if it is finished and intact, else built where `execution` says.

    The lock is held from the look-up to the signature, and inherited by the stage's processes on this machine: two
    runs that want the same artifact share the work, and the processes that a killed run left behind are waited for. A
    damaged artifact is built again.

    Raises: what `run_work` raises; ArtifactError if the stage ended with exit code 0 but left no valid record.
    """
    stage = STAGES[stage_name]
    stage.check_inputs(inputs)
    with digests_kept_in(store):
        key = stage.key(config, inputs)
    kind = stage.produces
    began = time.monotonic()
    with (
        disk_errors_explained(store.root),
        store.lock(kind, key, lambda owner: log(f"{kind} {key} is being built by {owner}: waiting")) as lock,
    ):
        waited = time.monotonic() - began
        mirror = mirror_from_environment()
        record = _find(store, kind, key, log)
        if record is not None and mirror is not None:
            _mirror_again(mirror, store, record, log)
        if record is None and mirror is not None and (record := mirror.fetch(store, kind, key)):
            log(f"{kind} {key} fetched from {mirror.url}")
        if record is not None:
            return Built(record.ref(str(store.directory(kind, key))), record, True, waited)
        store.check_room()
        store.sweep()
        directory = store.directory(kind, key)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / "spec.json", _spec(config, inputs, store))
        try:
            run_work(stage_name, config, directory, store, execution, lock, log, on_progress)
        except (ArtifactError, StageError) as error:
            if damaged := _set_damaged_inputs_aside(inputs, store):
                raise ArtifactError(
                    f"{error}\nIts input is damaged: {damaged}. "
                    "Run again: what is damaged is made anew, and nothing else"
                ) from error
            raise
        record = store.load(kind, key)
        problems = ["it has no record.json"] if record is None else store.problems(record)
        if record is None or problems:
            raise ArtifactError(
                f"{kind} {key}: the stage {stage_name} ended with exit code 0, but {'; '.join(problems)}. "
                f"See {directory}/stage.log"
            )
        if mirror is not None:
            mirror.push(store, record)
        return Built(record.ref(str(directory)), record, False, waited)


def _mirror_again(mirror: Mirror, store: Store, record: ArtifactRecord, log: Callable[[str], None]) -> None:
    """Put a finished artifact into the mirror unless it is there: its build may have been killed before it could.

    A mirror that does not answer costs a line of the log, for nothing has to be built.
    """
    try:
        if mirror.push(store, record):
            log(f"{record.kind} {record.key} put into {mirror.url}: whoever built it had not")
    except TransientError as error:
        log(f"{record.kind} {record.key} is found; {error}")


def _spec(config: Config, inputs: Mapping[str, ArtifactRef], store: Store) -> str:
    """Return spec.json: what `python -m stages NAME` needs to build the artifact."""
    spec = {
        "config": config.model_dump(mode="json"),
        "inputs": {name: ref.model_dump() for name, ref in inputs.items()},
        "store": str(store.root),
    }
    return json.dumps(spec, indent=1)


def _find(store: Store, kind: str, key: str, log: Callable[[str], None]) -> ArtifactRecord | None:
    """Return the finished artifact's record, or None.

    A damaged artifact is repaired from its inputs or set aside, and the log says so.
    """
    try:
        record = store.load(kind, key)
        problems = [] if record is None else store.problems(record)
    except NewerRecordError:
        raise
    except ArtifactError as error:
        record, problems = None, [str(error)]
    if problems:
        what = f"{kind} {key} is damaged ({'; '.join(problems)})"
        if record is not None and (repairs := repair_from_inputs(store, record)):
            log(f"{what}: {'; '.join(repairs)}")
            return record
        aside = set_damaged_aside(store, kind, key, "; ".join(problems))
        log(f"{what}: it lies in {aside}, nothing of it is deleted; building it again")
        return None
    if record is not None:
        # A kill between the signature and the clean-up leaves resume checkpoints, many times the artifact's size.
        shutil.rmtree(store.directory(kind, key) / "resume", ignore_errors=True)
    return record


def _set_damaged_inputs_aside(inputs: Mapping[str, ArtifactRef], store: Store) -> str:
    """Read every byte of a failed stage's inputs and set damaged ones aside. Returns what was wrong, or ""."""
    damaged = []
    for ref in inputs.values():
        if ref.key == "external":
            continue
        with store.lock(ref.kind, ref.key), suppress(ArtifactError):
            record = store.load(ref.kind, ref.key)
            if record is not None and (problems := store.problems(record, deep=True)):
                set_damaged_aside(store, ref.kind, ref.key, "; ".join(problems))
                damaged.append(f"{ref.kind} {ref.key} ({'; '.join(problems)})")
    return ", ".join(damaged)
