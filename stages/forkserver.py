"""python -m stages.forkserver SOCKET PARENT: fork stage processes from one that has imported their libraries.

A stage imports torch, transformers, DeepSpeed or vLLM before it works, 5 to 10 s of processor time. This process does
so once; each stage is then a fork of it, ready at once, below a supervisor of its own (running/supervise.py) that
ends its tree. tasks/forkserver.py asks for stages; for each it passes, with one byte over SOCKET, a connection, the
stage's output and the locks that the stage keeps open, and writes a `Request` into the connection. The answers there:

    started PID     the supervisor's process
    refused WHY     this process may not fork a stage: a library runs threads or holds a GPU, or serves another device
    ended CODE      the supervisor's last word

The stage's tree is ended when the other end of its connection closes, so when whoever asked dies. This process ends
with its PARENT and when SOCKET closes; the stages that it has forked do not need it. It never touches a GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from stages.__main__ import set_defaults
from stages.models.lazy import import_model_class
from stages.models.policy import pick_device
from stages.running.cost import before_fork
from stages.running.request import TREE, Request
from stages.running.supervise import die_with_parent, die_with_supervisor, supervise
from stages.stage import STAGES

MAX_FILES = 16
"""A request passes its connection, its output and a lock or two."""


class ForkedChild:
    """A child of this process that was forked, with the `poll` of subprocess.Popen."""

    def __init__(self, pid: int):
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


class ForkServer:
    """The loop of this process. `control`: the socket over which requests come."""

    def __init__(self, control: socket.socket):
        self.control = control
        self.children: list[ForkedChild] = []
        self.device: str | None = None
        """The device of the first stage: libraries choose it when they are imported."""

    def serve(self) -> None:
        """Answer requests until the other end of the socket closes."""
        while True:
            readable, _, _ = select.select([self.control], [], [], 1.0 if self.children else None)
            self.children = [child for child in self.children if child.poll() is None]
            if not readable:
                continue
            message, files, _, _ = socket.recv_fds(self.control, 1, MAX_FILES)
            if not message:
                return
            connection = socket.socket(fileno=files[0])
            try:
                self._answer(connection, files[1], files[2:])
            except (OSError, ValueError):  # whoever asked is gone
                traceback.print_exc()
            finally:
                connection.close()
                for file in files[1:]:
                    os.close(file)

    def _answer(self, connection: socket.socket, output: int, locks: list[int]) -> None:
        os.set_inheritable(connection.fileno(), False)
        with connection.makefile("rb") as lines:
            request = Request(**json.loads(lines.readline()))
        times = os.times()
        with _output_to(output):
            problem = self._prepare(request)
        if problem:
            connection.sendall(f"refused {problem}\n".encode())
            return
        spent = os.times()
        cpu_seconds = spent.user + spent.system - times.user - times.system
        gc.collect()
        gc.freeze()  # a collection in a child would copy the pages that it shares with this process
        pid = os.fork()
        if pid:
            self.children.append(ForkedChild(pid))
            return
        code = 1
        try:
            self.control.close()
            os.setsid()
            for file in (1, 2):
                os.dup2(output, file)
            for file in locks:
                os.set_inheritable(file, True)
            before_fork.seconds, before_fork.launched = cpu_seconds, request.launched
            code = _supervise(request, connection)
            connection.sendall(f"ended {code}\n".encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _prepare(self, request: Request) -> str:
        """Import what the process will, and return why it must not be forked from this one; "" if it may be."""
        _set_environment(request.environment)
        set_defaults()  # libraries read them when they are imported
        device = None
        with suppress(Exception):  # what is wrong with the request, or a library, is for the process itself to say
            if request.module == "stages":
                device = self._preload_stage(request)
            else:
                importlib.import_module(request.module).preload()
        self.device = self.device or device
        if device != self.device and device is not None:
            return f"it serves the device {self.device}"
        if (count := threading.active_count()) > 1:
            return f"an import has started {count - 1} threads"
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "an import has taken a GPU"
        return ""

    def _preload_stage(self, request: Request) -> str | None:
        """Import what the stage will, unless it wants another device; returns its device, None if it names none."""
        stage = STAGES[request.arguments[0]]
        spec = json.loads((Path(request.directory) / request.arguments[1]).read_text())
        config = stage.parse(spec["config"])
        device = getattr(getattr(config, "runtime", None), "device", None)
        if device is not None:
            device = pick_device(device)
        if self.device in (None, device) and (preload := getattr(stage.load(), "preload", None)):
            preload(config)
            with suppress(Exception):  # no model, or an unknown type: the stage itself says so
                import_model_class(spec["inputs"]["policy"]["path"])
        pa.array([], pa.int64())  # imports pandas, 0.3 s, where that is installed: so does each stage's first row
        return device


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def _output_to(output: int) -> Iterator[None]:
    """What is printed inside goes to this file descriptor, also from libraries that are not Python. No copy of it is left."""
    saved = [(file, os.dup(file)) for file in (1, 2)]
    for file, _ in saved:
        os.dup2(output, file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for file, copy in saved:
            os.dup2(copy, file)
            os.close(copy)
        _point_copies_nowhere(output)


def _point_copies_nowhere(output: int) -> None:
    """Point every copy of this descriptor that an import kept at /dev/null.

    DeepSpeed keeps one of stderr when it looks for libaio, and whoever reads the output waits until the last copy is
    closed. The number stays taken: the library may still use it.
    """
    with open(os.devnull, "wb") as nowhere:
        for file in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the descriptor of the listing itself
                if file > 2 and file != output and os.path.sameopenfile(file, output):
                    os.dup2(nowhere.fileno(), file)


def _supervise(request: Request, connection: socket.socket) -> int:
    """Start the stage as a child and end its tree with it; returns its exit code."""
    _mark(request.environment)
    command = ["-m", request.module, *request.arguments]
    _show_as([sys.executable, "-m", "stages.running.supervise", "--", *command])
    connection.sendall(f"started {os.getpid()}\n".encode())
    supervisor = os.getpid()

    def start() -> ForkedChild:
        pid = os.fork()
        if not pid:
            _become_stage(request, connection, supervisor)
        return ForkedChild(pid)

    def is_deserted() -> bool:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and not connection.recv(1)

    return supervise(start, request.grace, is_deserted)


def _become_stage(request: Request, connection: socket.socket, supervisor: int) -> None:
    """Be the process `python -m MODULE ARGUMENTS`, to its end."""
    code = 1
    try:
        connection.close()
        die_with_supervisor(supervisor)
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request.directory)
        sys.path[0] = request.directory
        _set_environment(request.environment)
        set_defaults()
        name = "stages.__main__" if request.module == "stages" else request.module
        module = importlib.import_module(name)
        sys.argv = [module.__file__ or "", *request.arguments]
        _show_as([sys.executable, "-m", request.module, *request.arguments])
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # each process draws its own, as Python's `random` does after a fork
        code = module.main(request.arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _memory_of(first: int) -> tuple[int, int]:
    """Two neighbouring fields of /proc/self/stat, counted from 1 as in proc(5): where a text begins and ends."""
    with open("/proc/self/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return int(fields[first - 3]), int(fields[first - 2])


def _write_memory(address: int, text: bytes) -> None:
    import ctypes

    ctypes.memmove(address, text, len(text))


def _show_as(words: list[str]) -> None:
    """Have ps and /proc show these words as the command of this process, as far as its own command had room."""
    begin, end = _memory_of(48)
    text = b"\0".join(os.fsencode(word) for word in words)[: end - begin - 1]
    _write_memory(begin, text.ljust(end - begin, b"\0"))


def _mark(environment: dict[str, str]) -> None:
    """Give this process and its forks the tree's mark in /proc/PID/environ, which otherwise shows what they began with.

    The mark is overwritten in place: it has the length of the one that this process was started with.
    """
    begin, end = _memory_of(50)
    with open("/proc/self/environ", "rb") as file:
        text = file.read()
    entry = f"{TREE}={environment[TREE]}".encode()
    offset = text.find(entry.partition(b"=")[0] + b"=")
    if offset >= 0 and begin + offset + len(entry) <= end:
        _write_memory(begin + offset, entry)


def main(arguments: list[str]) -> int:
    die_with_parent()
    if os.getppid() != int(arguments[1]):
        return 143
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ForkServer(socket.socket(fileno=int(arguments[0]))).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
