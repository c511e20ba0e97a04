"""Contracts - locks: one process at a time builds an artifact, whatever dies in between.

    <root>/locks/<kind>-<key>              locked (flock) by the builder, whose pid, host and time it holds as JSON
    <root>/locks/<kind>-<key>@<host>       the same under leases (lease.py), for the processes of one host
    <root>/locks/.<name>                   a lock that belongs to no artifact

flock belongs to the open file: the kernel drops it when the last process that has the file open is gone, however it
died. A process tree that inherits the descriptor keeps others out for as long as any of its processes lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from data_contracts import lease
from data_contracts.lease import LockOwner

READ_ONLY_ERRORS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextmanager
def hold(locks: Path, name: str, on_wait: Callable[[LockOwner], None], poll: float) -> Generator[int]:
    """Hold the lock `name` in the directory `locks`; yields the descriptor, for children to inherit.

    on_wait: called once, with the lock's owner, when the lock is not free
    poll: seconds between two attempts
    """
    host, across_hosts = os.uname().nodename, lease.is_enabled()
    # Under leases, flock is for the processes of one host and has a file per host, whatever the filesystem makes of it.
    path = locks / (f"{name}@{host}" if across_hosts else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = LockOwner(os.getpid(), host, time.strftime("%Y-%m-%d %H:%M:%S"))
    with _flock(path, on_wait, poll) as file:
        file.truncate(0)
        file.write(json.dumps(owner._asdict()))
        file.flush()
        if not across_hosts:
            yield file.fileno()
            return
        build_lease = lease.Lease(locks, name, owner)
        build_lease.acquire(on_wait, poll)
        try:
            yield file.fileno()
        finally:
            build_lease.release()


@contextmanager
def _flock(path: Path, on_wait: Callable[[LockOwner], None], poll: float) -> Generator[IO[str]]:
    announced = False
    while True:
        with open(path, "a+", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not announced:
                    on_wait(_read_owner(file))
                    announced = True
                time.sleep(poll)
                continue
            # `gc` may have removed the file between our opening and our locking it: another process may hold a new one.
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield file
                return


def _read_owner(file: IO[str]) -> LockOwner:
    file.seek(0)
    try:
        return LockOwner.from_json(json.loads(file.read()))
    except ValueError:
        return LockOwner()


class _Busy(Exception):
    """Another process holds the lock."""

    def __init__(self, owner: LockOwner):
        super().__init__(owner)
        self.owner = owner


@contextmanager
def try_hold(locks: Path, name: str) -> Generator[LockOwner | None]:
    """Hold the lock if it is free. Yields: None when this process holds it now, else the owner.

    In a directory that may only be read nothing can be held: None then says that nobody holds it.
    """

    def refuse(owner: LockOwner) -> None:
        raise _Busy(owner)

    with ExitStack() as stack:
        owner = None
        try:
            stack.enter_context(hold(locks, name, refuse, poll=0.0))
        except _Busy as busy:
            owner = busy.owner
        except OSError as error:
            if error.errno not in READ_ONLY_ERRORS:
                raise
            owner = _owner_of(locks / name)
        yield owner


def _owner_of(path: Path) -> LockOwner | None:
    """Return who holds a lock, without making its file; None if nobody of this host does."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read_owner(file)
    except OSError:
        pass
    return None


def lock_names(locks: Path) -> list[tuple[str, str]]:
    """Return (kind, key) of each artifact that is locked or once was."""
    names = {path.name.partition("@")[0].partition(".lease")[0] for path in locks.glob("[!.]*")}
    pairs = [name.rpartition("-") for name in sorted(names)]
    return [(kind, key) for kind, _, key in pairs if kind]
