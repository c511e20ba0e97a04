"""Stages - what a build costs: tokens, FLOPs, memory, processor seconds; written into the artifact's record.

FLOPs are model FLOPs, whatever the implementation does: 2 N per token of a forward pass, 6 N per token trained (Kaplan
et al. 2020, section 2.1; PaLM, appendix B), N = parameters. Attention's own part, 4 L T d per token, is left out: under
10 % below T = N / (20 L d).
"""

from __future__ import annotations

import json
import os
import resource
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from data_contracts.adapter import weights_directory
from stages.running.gpus import GpuWatch, gpu_cost
from stages.running.supervise import descendants

FORWARD, TRAIN, TRAIN_ADAPTER = 2, 6, 4
"""FLOPs per parameter and token. With an adapter the backward pass makes no gradient of the frozen weights."""
SUMMED = ("tokens_in", "tokens_out", "flops", "cache_hits", "cache_misses")
SPEED_EVENT = "speed"
"""Its `speed`: tokens_per_second and, on GPUs, mfu of a training."""
SECONDS_BETWEEN_LOOKS = 1.0
PAGE = os.sysconf("SC_PAGE_SIZE")


def process_start() -> float:
    """Return when the kernel started this process, in seconds since the epoch, to a hundredth.

    psutil's `create_time` is off by up to a second: it adds the kernel's `btime`, which counts whole seconds.
    """
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


class _Loading:
    """A context manager that adds up the seconds this process spends on importing libraries and loading models."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._depth += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:  # loading a model imports its library: count those seconds once
                self.seconds += time.monotonic() - start


loading = _Loading()


class _BeforeFork:
    """What was spent on this process before it was forked (stages/forkserver.py); nothing for one that was not."""

    launched: float | None = None
    """When it was asked for, in seconds since the epoch."""
    seconds = 0.0
    """Processor time of the imports that were made for it."""


before_fork = _BeforeFork()


@cache
def parameters(directory: str) -> int:
    """The number of parameters in a model's safetensors files, read from their headers; 0 without such files.

    Of a checkpoint that keeps an adapter only: of its base model.
    """
    total = 0
    for path in sorted(weights_directory(directory).glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for size in tensor["shape"]:
                    count *= size
                total += count
    return total


class MemoryWatch:
    """Sample, once a second, the memory that this process and its descendants hold together, and keep the peak.

    Resident sizes are added, so pages that processes share count more than once; the largest single process is a lower
    bound.
    """

    def __init__(self) -> None:
        self.peak_rss_bytes = 0
        self.gpus = GpuWatch()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()
        largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        self.peak_rss_bytes = max(self.peak_rss_bytes, largest * 1024)

    def _watch(self) -> None:
        while not self._closing.wait(SECONDS_BETWEEN_LOOKS):
            processes = [os.getpid(), *descendants()]
            self.peak_rss_bytes = max(self.peak_rss_bytes, sum(map(_resident, processes)))
            self.gpus.look(set(processes))


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def cost_of(events: Iterable[Mapping[str, Any]], watch: MemoryWatch) -> dict[str, float]:
    """The costs for the record: sums of the `used` events over all tries, GPUs of all processes, this try's peaks."""
    total: dict[str, float] = dict.fromkeys(SUMMED, 0)
    history = list(events)
    for event in history:
        if event["event"] == "used":
            for name in SUMMED:
                total[name] += event.get(name, 0)
    times = os.times()
    cost = {name: value for name, value in total.items() if value}
    for event in history:
        if event["event"] == SPEED_EVENT:
            cost |= event["speed"]
    cost["peak_rss_bytes"] = watch.peak_rss_bytes
    cpu_seconds = times.user + times.system + times.children_user + times.children_system
    cost["cpu_seconds"] = round(before_fork.seconds + cpu_seconds, 2)
    gpu_bytes, cost["gpus"] = gpu_cost(history, watch.gpus.peaks)
    if gpu_bytes:
        cost["peak_gpu_bytes"] = gpu_bytes
    return cost
