"""Tasks - start stages as forks of a server that has imported their libraries (stages/forkserver.py).

A process of ours has one server for an environment, started with the first stage and ended with the process. Variables
that are read when a library is imported make another environment; those in `VOLATILE` do not.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO

from stages.running.request import TREE, Request

VOLATILE = re.compile(r"SELFPLAY_|PREFECT_|MLFLOW_|PYTEST_CURRENT_TEST$|CUDA_VISIBLE_DEVICES$")
"""Variables that differ from stage to stage and that no library reads when it is imported."""
SWITCH = "SELFPLAY_FORK_SERVER"
"""Environment variable: `off` starts every stage as an interpreter of its own."""
MAX_SERVERS = 2
"""Of one process; a third environment ends the server that was not used for longest."""
POLL_SECONDS = 0.02
ROOM_FOR_A_NAME = " " * 600
"""An argument of the server that its forks overwrite: ps shows them as the stages that they are."""


class ForkServer:
    """A running server, as its parent knows it."""

    def __init__(self, environment: Mapping[str, str]):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "stages.forkserver", str(theirs.fileno()), str(os.getpid()), ROOM_FOR_A_NAME]
        self.process: subprocess.Popen[bytes] | None = None
        is_started = threading.Event()

        def keep() -> None:
            """The kernel ends the server when the thread that started it ends: this one, with the process."""
            try:
                self.process = subprocess.Popen(
                    command,
                    env={**environment, TREE: uuid.uuid4().hex},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=[theirs.fileno()],
                )
            finally:
                theirs.close()
                is_started.set()
            self.process.wait()

        threading.Thread(target=keep, name="fork server", daemon=True).start()
        is_started.wait()

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def close(self) -> None:
        """Let the server end; stages that it has forked go on."""
        self.control.close()


_servers: dict[frozenset[tuple[str, str]], ForkServer] = {}
"""By environment, the last used one last."""
_lock = threading.Lock()


def _server_for(environment: Mapping[str, str]) -> ForkServer:
    key = frozenset((name, value) for name, value in environment.items() if not VOLATILE.match(name))
    server = _servers.pop(key, None)
    if server is not None and not server.is_alive():
        server.close()
        server = None
    if server is None:
        while len(_servers) >= MAX_SERVERS:
            _servers.pop(next(iter(_servers))).close()
        server = ForkServer(environment)
    _servers[key] = server
    return server


class ForkedProcess:
    """The supervisor of `python -m MODULE ARGUMENTS`, with as much of subprocess.Popen as tasks/launch.py needs.

    Where the server cannot fork it, or dies before it has, `start_plainly` starts an interpreter for it.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        grace: float,
        inherit: Sequence[int],
        start_plainly: Callable[[int], subprocess.Popen[str]],
    ):
        reading, self._output = os.pipe()
        self.stdout: IO[str] = open(reading, errors="replace")  # noqa: SIM115 - whoever reads it closes it
        self.returncode: int | None = None
        self.pid: int | None = None
        """Of the supervisor, once it is started."""
        self._start_plainly = start_plainly
        self._plain: subprocess.Popen[str] | None = None
        self._received = b""
        self._connection, theirs = socket.socketpair()
        request = Request(module, list(arguments), environment, os.getcwd(), grace, time.time())
        with suppress(OSError):  # it is gone: `poll` reads the end of the connection
            with theirs, _lock:
                server = _server_for(environment)
                socket.send_fds(server.control, [b"+"], [theirs.fileno(), self._output, *inherit])
            self._connection.sendall(json.dumps(request._asdict()).encode() + b"\n")
        self._connection.setblocking(False)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self._plain is not None:
            self.returncode = self._plain.poll()
        elif self.returncode is None:
            self._read()
        return self.returncode

    def _read(self) -> None:
        """Take the server's answers."""
        is_open = False
        try:
            while chunk := self._connection.recv(4096):
                self._received += chunk
        except BlockingIOError:
            is_open = True
        except ConnectionError:
            pass
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            word, _, value = line.decode().partition(" ")
            if word == "started":
                self.pid = int(value)
                self._close_output()
            elif word == "ended":
                self._end_with(int(value))
            elif word == "refused":
                is_open = False
        if not is_open and self.returncode is None:
            if self.pid is not None:
                self._end_with(-signal.SIGKILL)  # a supervisor that was killed says no last word
            else:
                self._connection.close()
                self._plain = self._start_plainly(self._output)
                self.pid = self._plain.pid
                self._close_output()

    def _end_with(self, code: int) -> None:
        self.returncode = code
        self._connection.close()

    def _close_output(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises: subprocess.TimeoutExpired."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if (remaining := deadline - time.monotonic()) <= 0:
                raise subprocess.TimeoutExpired("a stage", timeout or 0)
            time.sleep(min(POLL_SECONDS, remaining))
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the supervisor. Before it is started, the request is withdrawn."""
        if self.poll() is not None:
            return
        if self.pid is None:
            self._close_output()
            self._end_with(-number)
        else:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
