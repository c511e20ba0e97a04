"""Tasks - share the GPUs of this machine between pieces of work: one lock file per GPU, held while the work runs."""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_contracts.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


def lock_directory() -> Path:
    """The directory of this user's GPU locks on this machine."""
    return Path(tempfile.gettempdir()) / f"selfplay-gpus-{os.getuid()}"


@contextmanager
def some_gpus(count: int, log: Callable[[str], None], poll: float = 1.0) -> Iterator[dict[str, str]]:
    """Hold `count` GPUs that no other work of this user on this machine has; yields the environment that names them.

    Waits until they are free, looking every `poll` seconds. Yields {} for 0.
    Raises: ConfigError if the machine has fewer.
    """
    if count == 0:
        yield {}
        return
    names = visible_gpus()
    if len(names) < count:
        setting = f" ({VISIBLE}={os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
        raise ConfigError(
            f"{count} GPUs are asked for, and {os.uname().nodename} shows {len(names)}{setting}: lower execution.gpus, "
            "sampling.backend.runtime.tensor_parallel_size or training.runtime.num_processes, or send the work to a "
            "larger node"
        )
    with ExitStack() as locks:
        yield {VISIBLE: ",".join(_lock(names, count, locks, log, poll))}


def _lock(names: list[str], count: int, locks: ExitStack, log: Callable[[str], None], poll: float) -> list[str]:
    """Lock `count` of the GPUs, for as long as `locks` is open; returns their names.

    All or none are taken: two works that each want several would otherwise wait for each other for ever.
    """
    directory = lock_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    announced = False
    while True:
        with ExitStack() as attempt:
            taken: list[str] = []
            for name in names:
                file = attempt.enter_context(open(directory / name.replace("/", "_"), "a"))
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
