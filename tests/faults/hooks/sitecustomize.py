"""Faults from inside a process: at its n-th change of the disk below a directory, something happens to it. The product knows nothing of this.

Python runs this module at start-up when its directory is on PYTHONPATH. FAULT is JSON:
    under   directory whose changes count            module  only in processes that are `python -m MODULE`, forks that stand for one too
    record  file: append every change (no fault)     once    file: made by the process that takes the fault; nobody takes it twice
    at      which change, from 1                     do      what happens: a key of ACTIONS or an errno name
    offset  seconds that time.time() is wrong by from the `at`-th change on
"""

import errno
import json
import os
import resource
import signal
import sys
import time

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR


def _memory_is_gone():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used, used))


def _to(who, number):
    return lambda: os.kill(who(), number)


def _parent_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[1])


def _flow():
    """The parent of the supervisor; of the fork server, where that has forked it."""
    pid = _parent_of(os.getppid())
    with open(f"/proc/{pid}/cmdline") as file:
        return _parent_of(pid) if "stages.forkserver" in file.read().split("\0") else pid


ACTIONS = {
    "kill": _to(os.getpid, signal.SIGKILL),
    "term": _to(os.getpid, signal.SIGTERM),
    "int": _to(os.getpid, signal.SIGINT),
    "stop": _to(os.getpid, signal.SIGSTOP),
    "segv": _to(os.getpid, signal.SIGSEGV),
    "kill supervisor": _to(os.getppid, signal.SIGKILL),
    "term supervisor": _to(os.getppid, signal.SIGTERM),
    "stop supervisor": _to(os.getppid, signal.SIGSTOP),
    "kill flow": _to(_flow, signal.SIGKILL),
    "term flow": _to(_flow, signal.SIGTERM),
    "int flow": _to(_flow, signal.SIGINT),
    # What is being written is cut at 64 bytes, as a full disk cuts it.
    "short write": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)),
    "no memory": _memory_is_gone,
}


class Fault:
    def __init__(self, settings):
        self.settings, self.count, self.busy, self.wrong = settings, 0, False, 0.0
        self.under = settings["under"].rstrip("/") + "/"

    def audit(self, event, arguments):
        if self.busy:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0]
        else:
            return
        self.see(event, path)

    def see(self, event, path):
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if not path.startswith(self.under):
            return
        self.busy = True
        try:
            self.count += 1
            if "record" in self.settings:
                with open(self.settings["record"], "a") as file:
                    file.write(json.dumps([event, path.removeprefix(self.under)]) + "\n")
            elif self.count == self.settings["at"]:
                self.happen(event, path)
        finally:
            self.busy = False

    def happen(self, event, path):
        try:
            with open(self.settings["once"], "x") as file:
                file.write(json.dumps({"event": event, "path": path.removeprefix(self.under), "pid": os.getpid()}))
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            return
        do = self.settings["do"]
        if do == "clock":
            self.wrong = self.settings["offset"]
        elif do in ACTIONS:
            ACTIONS[do]()
            if do.startswith("stop"):
                time.sleep(0.2)
        else:
            number = getattr(errno, do)
            raise OSError(number, os.strerror(number), path)


def _install(settings):
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:4] else ""
    if module == "stages.forkserver" and settings.get("module") == "stages":
        _install_in_stages(settings)
    elif module == settings.get("module", module):
        _watch(settings)


def _install_in_stages(settings):
    """A stage is the fork of a fork: its supervisor lies between."""
    generation = 0

    def count():
        nonlocal generation
        generation += 1
        if generation == 2:
            _watch(settings)

    os.register_at_fork(after_in_child=count)


def _watch(settings):
    fault = Fault(settings)
    real_fsync, real_time = os.fsync, time.time

    def fsync(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        fault.see("fsync", os.readlink(f"/proc/self/fd/{number}"))
        return real_fsync(descriptor)

    os.fsync = fsync
    if settings.get("do") == "clock":
        time.time = lambda: real_time() + fault.wrong
    sys.addaudithook(fault.audit)


if os.environ.get("FAULT"):
    _install(json.loads(os.environ["FAULT"]))
