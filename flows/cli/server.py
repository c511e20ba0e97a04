"""Flows - a Prefect server for a run started by hand, where none is configured: its UI shows the run while it lasts."""

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
from stages.running.supervise import supervisor_options

START_SECONDS = 120
ANSWER_SECONDS = 10
"""For a server that somebody else has started, maybe a moment ago."""
RESTARTS = 5
"""How often a server that dies under a run is started again."""


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The URL of the API: the configured one, or a server of our own on 127.0.0.1 with its database in `home`. Before prefect is imported.

    Not Prefect's ephemeral server: that one outlives a killed parent. Ours runs under the supervisor and dies with this process.
    Raises: TransientError if the server does not answer.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        _check_answers(url)
        yield url
        return
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    own = {
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_UI_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
    }
    os.environ.update(own)
    server = _Server(port, home / "server.log")
    try:
        importlib.import_module("flows.run")  # prefect and mlflow: as long as the server's start, and beside it
        with suppress(Exception):  # whatever is wrong with MLflow, the tracker says it and the run goes on
            from tasks.tracking import import_client

            import_client()
        _wait(server, url)
        yield url
    finally:
        _send_what_is_left()
        server.stop()


class _Server:
    """The server's process, under the supervisor, started again if it dies: it is the run's picture, not the run.

    (Without it every stage would wait over a minute for Prefect's client to give up.)
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
        # The kernel ends what a thread has started when that thread ends: this one lives as long as the run.
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _watch(self) -> None:
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
        self.closing.set()
        self.watch.join()
        self.process.terminate()
        self.process.wait(15)


def _send_what_is_left() -> None:
    """Prefect's log and event threads would go on asking a stopped server for a minute when this process exits."""
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
    """Something answers there: what it says, and with which certificate, is for Prefect's client to judge."""
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
                    f"the Prefect server at {url} (PREFECT_API_URL) does not answer: {reason}. Start it (prefect server start), or unset "
                    "PREFECT_API_URL: then the run brings its own"
                ) from None
        time.sleep(0.2)


def _wait(server: _Server, url: str) -> None:
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
