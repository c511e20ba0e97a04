"""Stages - the GPU memory of a build: each process reports its own counters, and one thread watches engines' children.

The driver lists processes by the numbers they have on the host, which a container does not know. So each process that
used CUDA (a stage, a worker, a rank) reports what torch counted in it, and a child of another kind (vLLM's engine core)
is seen by what its GPU holds more than before.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from data_contracts.errors import TransientError

GPU_EVENT = "gpu"
HOST_PID_NAMESPACE = "pid:[4026531836]"
"""The kernel's fixed name of the namespace outside of all containers."""
ENGINE_CONTEXT_BYTES = 2**30
"""What CUDA's context and libraries of an engine take of a GPU before it looks what is free."""
LEAST_BYTES = 2**28
"""A GPU that holds less than this above its start is not counted as used: contexts of other processes come and go."""

PEAKS = (
    ("B200", 2250e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
"""Dense bf16 FLOP/s by a part of the GPU's name; the first that fits counts (NVIDIA's data sheets)."""


def peak_flops(name: str) -> float | None:
    """The FLOP/s in bf16 of a GPU of this name; None if it is not in PEAKS."""
    return next((flops for part, flops in PEAKS if part in name), None)


def torch_peaks() -> dict[str, int]:
    """The most bytes that torch reserved in this process on each GPU, by the GPU's UUID; {} where CUDA was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peaks = {}
    for index in range(torch.cuda.device_count()):
        if reserved := torch.cuda.max_memory_reserved(index):
            peaks[str(torch.cuda.get_device_properties(index).uuid)] = reserved
    return peaks


def report_rank(directory: Path) -> None:
    """Write down this rank's GPU memory, in an event file of its own (stages/running/history.py)."""
    if peaks := torch_peaks():
        event = {"event": GPU_EVENT, "time": time.time(), "pid": os.getpid(), "peaks": peaks}
        path = directory / f".events-{platform.node()}-{os.getpid()}-rank.jsonl"
        path.write_text(json.dumps(event) + "\n", encoding="utf-8")


def gpu_cost(events: Iterable[Mapping[str, Any]], watched: Mapping[str, int]) -> tuple[int, int]:
    """(bytes on all GPUs, number of GPUs), from the events of all processes and from what the watch saw, by UUID.

    Each GPU counts its largest process, and at least what the watch saw.
    """
    peaks = dict(watched)
    for event in events:
        if event["event"] == GPU_EVENT:
            for uuid, size in event["peaks"].items():
                peaks[uuid] = max(size, peaks.get(uuid, 0))
    return sum(peaks.values()), len(peaks)


class GpuWatch:
    """The GPUs that a process and its descendants hold memory on, by the driver; `look` as often as wanted."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.start = {} if _nvml() is None else _used_bytes()
        self.knows_processes = os.readlink("/proc/self/ns/pid") == HOST_PID_NAMESPACE

    def look(self, processes: set[int]) -> None:
        """Update the peaks: by process where its number is the driver's, else by what a GPU holds above its start."""
        if _nvml() is None:
            return
        if self.knows_processes:
            sizes = _bytes_of(processes)
        else:
            sizes = {uuid: used - self.start.get(uuid, 0) for uuid, used in _used_bytes().items()}
            sizes = {uuid: size for uuid, size in sizes.items() if size >= LEAST_BYTES}
        for uuid, size in sizes.items():
            self.peaks[uuid] = max(size, self.peaks.get(uuid, 0))


def _bytes_of(processes: set[int]) -> dict[str, int]:
    nvml, sizes = _nvml(), {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        users = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        if size := sum(user.usedGpuMemory or 0 for user in users if user.pid in processes):
            sizes[_uuid(handle)] = size
    return sizes


def _used_bytes() -> dict[str, int]:
    """What each GPU that this process may see holds in all."""
    return {uuid: memory.used for uuid, memory in _memory().items()}


def gpu_names() -> list[str]:
    """Return the name of each GPU that this process may see; [] where the driver says nothing."""
    if _nvml() is None:
        return []
    return [_text(_nvml().nvmlDeviceGetName(handle)) for handle in _visible().values()]


def _memory() -> dict[str, Any]:
    """What the driver says of the memory of each GPU that this process may see (total, free, used), by UUID."""
    return {uuid: _nvml().nvmlDeviceGetMemoryInfo(handle) for uuid, handle in _visible().items()}


def _visible() -> dict[str, Any]:
    """UUID -> the driver's handle of each GPU that this process may see, in the order of CUDA_VISIBLE_DEVICES."""
    nvml, cards = _nvml(), {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        cards[str(index), _uuid(handle)] = handle
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {uuid: handle for (_, uuid), handle in cards.items()}
    return {
        uuid: handle
        for name in visible.split(",")
        for (index, uuid), handle in cards.items()
        if name.strip() == index or (name.strip() and uuid.startswith(name.strip().removeprefix("GPU-")))
    }


def engine_share(most: float, weights: int, count: int = 1) -> float:
    """The part of its GPUs' memory that an engine may take: `most`, or less where others hold some of it.

    weights: bytes of the model. count: GPUs that share it. `most` is returned where the driver says nothing.
    Raises: TransientError if what is free cannot even hold the weights.
    """
    cards = [] if _nvml() is None else list(_memory().items())[:count]
    for uuid, memory in cards:
        free = memory.free - ENGINE_CONTEXT_BYTES
        if free < weights // count:
            raise TransientError(
                f"GPU {uuid} has {memory.free / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}, and the model's "
                f"weights take {weights / count / 2**30:.1f}: other processes hold the rest (nvidia-smi names them)"
            )
        most = min(most, free / memory.total)
    return most


def _uuid(handle: Any) -> str:
    """A GPU's UUID as torch writes it, without "GPU-"."""
    return _text(_nvml().nvmlDeviceGetUUID(handle)).removeprefix("GPU-")


def _text(value: bytes | str) -> str:
    """The driver's answer as text: older libraries give bytes."""
    return value.decode() if isinstance(value, bytes) else value


@cache
def _nvml() -> Any:
    """NVIDIA's library, or None without a GPU, the library or an answer of the driver."""
    if not Path("/dev/nvidiactl").exists():
        return None
    try:
        import pynvml  # pyright: ignore[reportMissingImports] - comes with vLLM's CUDA build

        pynvml.nvmlInit()
    except Exception:  # leave the figures out, the stage goes on
        return None
    return pynvml
