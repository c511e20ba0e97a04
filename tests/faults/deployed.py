"""The way through a server: a real Prefect server, its pools and deployments, and workers that can be killed, as deploy/README.md says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.running.supervise import processes_with, signal_all, supervisor_options

ROOT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, log: Path | None = None) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s" + (f"\n{log.read_text()[-3000:]}" if log else ""))


class Cluster:
    """A server and the deployments of prefect.yaml, in processes that all carry a mark."""

    def __init__(self, home: Path, environment: dict[str, str]):
        self.port, self.mark = free_port(), f"FAULT_MARK={uuid.uuid4().hex}"
        self.url, self.log, self.store = f"http://127.0.0.1:{self.port}/api", home / "log.txt", home / "store"
        self.started: list[subprocess.Popen] = []
        self.environment = environment | {
            "PREFECT_HOME": str(home), "PREFECT_API_URL": self.url, "PREFECT_SERVER_UI_API_URL": self.url, "PREFECT_WORKER_QUERY_SECONDS": "2",
            "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
            "SELFPLAY_HOME": str(ROOT), "SELFPLAY_STORE": str(self.store), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false", "PYTHONPATH": str(ROOT),
            "PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"), "FAULT_MARK": self.mark.partition("=")[2],
        }  # fmt: skip

    def start(self, *words: str, supervised: bool = True) -> subprocess.Popen:
        """`prefect WORDS`, in the background; under the supervisor it takes along whatever it has started."""
        command = [*PREFECT, *words]
        if supervised:
            command = [sys.executable, "-m", "stages.running.supervise", *supervisor_options(5), *command]
        with open(self.log, "ab") as log:
            self.started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
        return self.started[-1]

    def worker(self, supervised: bool = True) -> subprocess.Popen:
        return self.start("worker", "start", "--pool", "selfplay", supervised=supervised)

    def prefect(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*PREFECT, *words], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server's API answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def run(self, *words: str, deployment: str = "own", timeout: float = 300) -> subprocess.CompletedProcess:
        return self.prefect("deployment", "run", f"self-play/{deployment}", *words, timeout=timeout)

    def last_run(self) -> dict[str, Any]:
        return self.ask("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]

    def state(self, run: dict[str, Any]) -> str:
        return self.ask(f"/flow_runs/{run['id']}")["state_type"]


@contextmanager
def server(home: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster's server, without pools and deployments; nothing of it is left afterwards."""
    one = Cluster(home, environment)
    one.start("server", "start", "--host", "127.0.0.1", "--port", str(one.port))
    try:
        wait_for(lambda: one.ask("/health"), 120, one.log)
        yield one
    finally:
        for process in reversed(one.started):
            process.terminate()
        for process in one.started:
            process.wait(30)
        signal_all(processes_with(one.mark), signal.SIGKILL)


@contextmanager
def cluster(home: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster, without a worker."""
    with server(home, environment) as one:
        for pool in ("selfplay", "selfplay-work"):
            assert one.prefect("work-pool", "create", pool, "--type", "process").returncode == 0
        for file in ("prefect.yaml", "deploy/prefect/work.yaml"):
            deployed = one.prefect("--no-prompt", "deploy", "--prefect-file", file, "--all")
            assert deployed.returncode == 0, deployed.stdout
        yield one
