"""Flows - a Prefect server for a run started by hand, where none is configured: its UI shows the run while it lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_contracts.errors import TransientError

START_SECONDS = 120


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The URL of the API: the configured one, or a server of our own on 127.0.0.1 with its database in `home`. Before prefect is imported.

    Not Prefect's ephemeral server: that one outlives a killed parent. Ours runs under the supervisor and dies with this process.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield os.environ["PREFECT_API_URL"]
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
    command = [
        sys.executable,
        "-m",
        "stages.supervise",
        "--grace",
        "3",
        "--",
        sys.executable,
        "-m",
        "uvicorn",
        "--app-dir",
        ".",
        "--factory",
    ]
    command += [
        "prefect.server.api.server:create_app",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "warning",
        "--timeout-keep-alive",
        "5",
    ]
    with open(home / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(server, url, home)
        yield url
    finally:
        _send_what_is_left()
        server.terminate()
        server.wait(15)


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


def _wait(server: subprocess.Popen, url: str, home: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise TransientError(f"the Prefect server ended at once; its log: {home}/server.log")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TransientError(f"the Prefect server did not answer within {START_SECONDS} s; its log: {home}/server.log")
