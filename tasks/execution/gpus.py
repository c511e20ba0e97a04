"""Tasks - share the GPUs of this machine between pieces of work: one lock file per GPU, held while the work runs.

A lock file is named for the GPU's UUID: a GPU has one, whether CUDA_VISIBLE_DEVICES names it by number or by UUID.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from data_contracts.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus(env: Mapping[str, str] | None = None) -> list[str]:
    """Names of the GPUs that work may use: its own CUDA_VISIBLE_DEVICES, else this process's, else all of nvidia-smi.

    env: environment variables of the work.
    Raises: ConfigError if the work's own names a GPU that this process may not use.
    """
    uuids = gpu_uuids()
    names = _distinct(os.environ[VISIBLE], uuids) if VISIBLE in os.environ else list(uuids)
    if env is None or VISIBLE not in env:
        return names
    chosen = _distinct(env[VISIBLE], uuids)
    allowed = {uuid_of(name, uuids) for name in names}
    if hidden := [name for name in chosen if uuid_of(name, uuids) not in allowed]:
        raise ConfigError(
            f"runtime.env or execution.env sets {VISIBLE}={env[VISIBLE]}, and {os.uname().nodename} may use the GPUs "
            f"{','.join(names) or 'none'}, without {hidden[0]}: name some of these, or leave the variable out"
        )
    return chosen


def _distinct(names: str, uuids: Mapping[str, str]) -> list[str]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES names, each once, as it names them."""
    listed = [name.strip() for name in names.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    return list({uuid_of(name, uuids): name for name in reversed(listed)}.values())[::-1]


def gpu_uuids() -> dict[str, str]:
    """Number -> UUID of every GPU of this machine, in the driver's order; {} without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = [line.split(",") for line in process.stdout.splitlines() if "," in line]
    return {number.strip(): uuid.strip() for number, uuid in lines}


@cache
def machine_has_gpus() -> bool:
    """Whether this machine has a GPU; nvidia-smi takes a second or more, and is asked once per process."""
    return bool(gpu_uuids())


def uuid_of(name: str, uuids: Mapping[str, str]) -> str:
    """The UUID of a GPU named by number, by UUID or by the beginning of one; the name itself where none is known."""
    if name in uuids:
        return uuids[name]
    matches = [uuid for uuid in uuids.values() if uuid.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    return name


def lock_directory() -> Path:
    """The directory of this user's GPU locks on this machine."""
    return Path(tempfile.gettempdir()) / f"selfplay-gpus-{os.getuid()}"


@contextmanager
def some_gpus(
    count: int, log: Callable[[str], None], env: Mapping[str, str] | None = None, poll: float = 1.0
) -> Iterator[dict[str, str]]:
    """Hold `count` GPUs that no other work of this user on this machine has; yields the environment that names them.

    Waits until they are free, looking every `poll` seconds. Yields {} for 0. env: environment variables of the work,
    whose CUDA_VISIBLE_DEVICES says among which GPUs to choose.
    Raises: ConfigError if there are fewer.
    """
    if count == 0:
        yield {}
        return
    names = visible_gpus(env)
    if len(names) < count:
        setting = (env or {}).get(VISIBLE, os.environ.get(VISIBLE))
        setting = "" if setting is None else f" ({VISIBLE}={setting})"
        raise ConfigError(
            f"{count} GPUs are asked for, and {os.uname().nodename} shows {len(names)}{setting}: lower execution.gpus, "
            "sampling.backend.runtime.tensor_parallel_size or training.runtime.num_processes, or send the work to a "
            "larger node"
        )
    with ExitStack() as locks:
        yield {VISIBLE: ",".join(_lock(names, count, locks, log, poll))}


def _lock(names: Sequence[str], count: int, locks: ExitStack, log: Callable[[str], None], poll: float) -> list[str]:
    """Lock `count` of the GPUs, for as long as `locks` is open; returns their names.

    All or none are taken: two works that each want several would otherwise wait for each other for ever.
    """
    directory = lock_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    announced = False
    uuids = gpu_uuids()
    while True:
        with ExitStack() as attempt:
            taken: list[str] = []
            for name in names:
                file = attempt.enter_context(open(directory / uuid_of(name, uuids).replace("/", "_"), "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                taken.append(name)
                if len(taken) == count:
                    locks.push(attempt.pop_all())
                    return taken
        if not announced:
            log(f"waiting for {count} of the GPUs {','.join(names)}: other work has them")
            announced = True
        time.sleep(poll)
