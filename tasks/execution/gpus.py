"""Tasks - which GPUs of this machine a piece of work may use: one lock file per GPU, held while it runs."""

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


def gpus_here() -> list[str]:
    """The GPUs that this process may see: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists."""
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
    return Path(tempfile.gettempdir()) / f"selfplay-gpus-{os.getuid()}"


@contextmanager
def some_gpus(count: int, log: Callable[[str], None], poll: float = 1.0) -> Iterator[dict[str, str]]:
    """Environment that shows `count` GPUs which no other work of this user on this machine has; waits for them. Nothing for 0.

    Raises: ConfigError if the machine has fewer.
    """
    if count == 0:
        yield {}
        return
    here = gpus_here()
    if len(here) < count:
        seen = f" ({VISIBLE}={os.environ[VISIBLE]})" if VISIBLE in os.environ else ""
        raise ConfigError(
            f"{count} GPUs are asked for, and {os.uname().nodename} shows {len(here)}{seen}: lower execution.gpus, "
            "sampling.backend.runtime.tensor_parallel_size or training.runtime.num_processes, or send the work to a larger node"
        )
    with ExitStack() as held:
        taken = _take(here, count, held, log, poll)
        yield {VISIBLE: ",".join(taken)}


def _take(here: list[str], count: int, held: ExitStack, log: Callable[[str], None], poll: float) -> list[str]:
    """All or nothing, so that two that want several each do not wait for each other for ever."""
    directory = lock_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    told = False
    while True:
        with ExitStack() as trying:
            taken = []
            for name in here:
                file = trying.enter_context(open(directory / name.replace("/", "_"), "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                taken.append(name)
                if len(taken) == count:
                    held.push(trying.pop_all())
                    return taken
        if not told:
            log(f"waiting for {count} of the GPUs {','.join(here)}: other work has them")
            told = True
        time.sleep(poll)
