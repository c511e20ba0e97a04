"""Stages - what a build costs: tokens, FLOPs, memory, processor seconds. Kept in the record; `data_contracts/ledger.py`
adds records up.

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
from pathlib import Path
from typing import Any

from stages.running.supervise import descendants

FORWARD, TRAIN = 2, 6
"""FLOPs per parameter and token."""
SUMMED = ("tokens_in", "tokens_out", "flops", "cache_hits", "cache_misses")
SECONDS_BETWEEN_LOOKS = 1.0
PAGE = os.sysconf("SC_PAGE_SIZE")


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


@cache
def parameters(directory: str) -> int:
    """The number of parameters in a model's safetensors files, read from their headers; 0 without such files."""
    total = 0
    for path in sorted(Path(directory).glob("*.safetensors")):
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
        self.peak_rss_bytes = self.peak_gpu_bytes = self.gpus = 0
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
            gpu_bytes, gpus = _gpu_memory(set(processes))
            self.peak_gpu_bytes, self.gpus = max(self.peak_gpu_bytes, gpu_bytes), max(self.gpus, gpus)


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except OSError:
        return 0


def _gpu_memory(processes: set[int]) -> tuple[int, int]:
    """(bytes that these processes hold on all GPUs, number of these GPUs), by the driver; (0, 0) without one."""
    nvml = _nvml()
    if nvml is None:
        return 0, 0
    total = gpus = 0
    for index in range(nvml.nvmlDeviceGetCount()):
        users = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(index))
        sizes = [user.usedGpuMemory or 0 for user in users if user.pid in processes]
        total, gpus = total + sum(sizes), gpus + bool(sizes)
    return total, gpus


@cache
def _nvml() -> Any:
    if not Path("/dev/nvidiactl").exists():
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports] - comes with vLLM's CUDA build

        pynvml.nvmlInit()
    except Exception:  # the driver does not answer: leave the figures out, the stage goes on
        return None
    return pynvml


def cost_of(events: Iterable[Mapping[str, Any]], watch: MemoryWatch) -> dict[str, float]:
    """The costs for the record: sums of the `used` events over all tries, and the peaks of this try."""
    total: dict[str, float] = dict.fromkeys(SUMMED, 0)
    for event in events:
        if event["event"] == "used":
            for name in SUMMED:
                total[name] += event.get(name, 0)
    times = os.times()
    cost = {name: value for name, value in total.items() if value}
    cost["peak_rss_bytes"] = watch.peak_rss_bytes
    cost["cpu_seconds"] = round(times.user + times.system + times.children_user + times.children_system, 2)
    cost["gpus"] = watch.gpus
    if watch.gpus:
        cost["peak_gpu_bytes"] = watch.peak_gpu_bytes
    return cost
