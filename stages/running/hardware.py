"""Stages - the machine that a build ran on, in one line for people: processor, cores, memory, GPUs."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

from stages.running.gpus import gpu_names


def hardware() -> str:
    """Return e.g. "2 cores of AMD EPYC, 8 GiB" or "16 cores of Intel Xeon, 128 GiB, 1 x NVIDIA H100 80GB HBM3"."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{os.cpu_count()} cores of {_processor()}", f"{memory:.0f} GiB"]
    parts += [f"{count} x {name}" for name, count in Counter(gpu_names()).items()]
    return ", ".join(parts)


def _processor() -> str:
    """Return the processor's name, or its architecture where Linux does not say it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((name for name in names if name), platform.machine())
