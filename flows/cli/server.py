"""Flows - a Prefect server for a run that is started by hand, where none is configured; its UI shows the run."""

from __future__ import annotations

import http.client
import importlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_contracts.errors import TransientError
from data_contracts.installation import import_paths
from stages.running.supervise import supervisor_options

START_SECONDS = 300
"""For our own server, from its start to its first answer: seconds on an idle machine, minutes on one with other work."""
ANSWER_SECONDS = 10
"""For a server that the user has started, maybe a moment ago."""
RESTARTS = 5
"""How often a server that dies during a run is started again."""


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The URL of the API: of the configured server, or of one that is started on 127.0.0.1 with its database in `home`.

    Call it before prefect is imported. Prefect's own ephemeral server would outlive a killed parent; this one runs
    under the supervisor and dies with this process. Raises: TransientError if the server does not answer.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        _check_answers(url)
        yield url
        return
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    os.environ |= _environment(url, home)
    print(f"starting a Prefect server for this run; its log: {home / 'server.log'}", flush=True)
    server = _Server(port, home / "server.log")
    try:
        _import_clients()
        _wait_for_start(server, url)
        yield url
    finally:
        _drain_prefect_workers()
        server.stop()


def _environment(url: str, home: Path) -> dict[str, str]:
    """Variables of a server of our own, its clients and all that they start."""
    return {
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_UI_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
    }


def _import_clients() -> None:
    """Import prefect and mlflow while the server starts; both take equally long."""
    importlib.import_module("flows.run")
    with suppress(Exception):  # the tracker reports what is wrong with MLflow, and the run goes on
        from tasks.tracking import import_client

        import_client()


UNREACHABLE = "Failed to reach API"
"""How the RuntimeError of Prefect's client begins when its version check gets no answer."""


class _Server:
    """The server's process, under the supervisor, started again if it dies.

    The run does not need it, but without a server each stage would wait over a minute for Prefect's client to give up.
    """

    def __init__(self, port: int, log: Path):
        uvicorn = ["-m", "uvicorn", "--app-dir", ".", "--factory", "prefect.server.api.server:create_app"]
        uvicorn += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--timeout-keep-alive", "5"]
        self.command = [
            sys.executable,
            "-m",
            "stages.running.supervise",
            *supervisor_options(3),
            sys.executable,
            *uvicorn,
        ]
        self.log = log
        self.process = self._start()
        self.is_given_up = False
        self.closing = threading.Event()
        # The supervisor dies with the thread that started it, so this thread lives as long as the run.
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command,
                env=os.environ | import_paths(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _watch(self) -> None:
        """Start the process again whenever it ends, RESTARTS times at most."""
        restarts = 0
        while not self.closing.wait(0.5):
            if self.process.poll() is None:
                continue
            if restarts == RESTARTS:
                self.is_given_up = True
                return
            restarts += 1
            self.process = self._start()

    def stop(self) -> None:
        """End the process and its children."""
        self.closing.set()
        self.watch.join()
        self.process.terminate()
        self.process.wait(15)


def _drain_prefect_workers() -> None:
    """Send what waits in Prefect's log and event threads, which would try a stopped server for a minute at exit."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_answers(url: str) -> None:
    """Wait until the port answers; HTTP and TLS errors are left to Prefect's client. Raises: TransientError."""
    end = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5):
                return
        except (urllib.error.HTTPError, http.client.HTTPException, ssl.SSLError):
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return
            if time.monotonic() > end or isinstance(error, ValueError):
                raise TransientError(
                    f"the Prefect server at {url} (PREFECT_API_URL) does not answer: {reason}. Start it (prefect "
                    "server start), or unset PREFECT_API_URL: then the run starts a server of its own"
                ) from None
        time.sleep(0.2)


@contextmanager
def server_errors_explained(url: str) -> Iterator[None]:
    """Raises: TransientError where Prefect's client lost its server, as when that starts again during the client's
    version check; every other error passes."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(UNREACHABLE):
            raise
        raise TransientError(
            f"the Prefect server at {url} went away while the run was starting ({error.__cause__ or error}). Run the same "
            "command again: what is built is found"
        ) from error


def _wait_for_start(server: _Server, url: str) -> None:
    """Wait for our own server's first answer. Raises: TransientError."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.is_given_up:
            raise TransientError(f"the Prefect server ended {RESTARTS + 1} times; its log: {server.log}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TransientError(f"the Prefect server did not answer within {START_SECONDS} s; its log: {server.log}")
