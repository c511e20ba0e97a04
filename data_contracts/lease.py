"""Contracts - a lease with a fence: who may build an artifact, where the kernel's locks do not reach from host to host.

    <root>/locks/<kind>-<key>.lease-00000007    {"owner": ..., "beat": 42, "released": false}; the highest number counts

flock is the lock of one host. A shared filesystem may not carry it to the other hosts: NFS mounted with `nolock` or
`local_lock=flock`, most FUSE mounts. Set SELFPLAY_LOCKS=lease there.

A process holds the lease when it created the file with the highest number, the *token*, by an exclusive create. It then
rewrites the file several times per lease time. A process that waits reads the file: when the content has not changed
for a whole lease time, by the reader's own clock, the owner counts as dead. Two clocks are never compared. An owner
that stood still and was taken for dead finds a token above its own and may neither write a shard nor sign a record:
`check_fence`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_contracts.errors import ArtifactError, ConfigError

MODE, SECONDS, FENCE = "SELFPLAY_LOCKS", "SELFPLAY_LEASE_SECONDS", "SELFPLAY_FENCE"
"""Environment variables: which locks to use; the lease time; the lease that a stage process inherits, as name:token."""
DEFAULT_SECONDS = 120.0
"""Longer than a minute: an NFS client may answer from its cache for that long."""


class LockOwner(NamedTuple):
    """The process that holds a lock, as its lock file says."""

    pid: int = 0
    """0: the lock file does not say."""
    host: str = ""
    since: str = ""
    """Local time of the owner's host, for people."""

    @classmethod
    def from_json(cls, value: object) -> LockOwner:
        """Return the owner that a parsed lock file names; what is missing or malformed keeps its default."""
        if not isinstance(value, dict):
            return cls()
        fields = cast(dict[str, object], value)
        pid = fields.get("pid")
        return cls(pid if isinstance(pid, int) else 0, str(fields.get("host") or ""), str(fields.get("since") or ""))

    def __str__(self) -> str:
        if not self.pid:
            return "a process that its lock file does not name"
        return f"process {self.pid} on {self.host} since {self.since}"


def is_enabled() -> bool:
    """Return whether builders lock by leases, which reach beyond this host. Raises: ConfigError."""
    mode = os.environ.get(MODE) or "flock"
    if mode not in ("flock", "lease"):
        raise ConfigError(
            f"{MODE} is {mode!r}: it must be flock (one host, or a filesystem that carries flock) "
            "or lease (any shared filesystem)"
        )
    return mode == "lease"


def lease_seconds() -> float:
    """Return the lease time from the environment. Raises: ConfigError."""
    text = os.environ.get(SECONDS) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{SECONDS} is {text!r}: it must be a number of seconds above 0")
    return seconds


HELD: dict[str, int] = {}
"""Name of an artifact (<kind>-<key>) -> token, for the leases that this process holds."""


class Lease:
    """The right to build one artifact, on every host that sees the directory `locks`."""

    def __init__(self, locks: Path, name: str, owner: LockOwner, seconds: float | None = None):
        self.locks, self.name, self.owner = locks, name, owner
        self.seconds = seconds or lease_seconds()
        self.token = 0
        self._beat, self._stop = 0, threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, on_wait: Callable[[LockOwner], None], poll: float) -> int:
        """Wait for the lease, take it and return its token. `on_wait(owner)` is called once, when there is a wait.

        The caller holds the flock of this host, so an owner on this host is dead.
        """
        announced, last_state, last_change = False, None, time.monotonic()
        while True:
            highest = highest_token(self.locks, self.name)
            state = _read_state(self._path(highest)) if highest else _State(released=True)
            if state != last_state:
                last_state, last_change = state, time.monotonic()
            stands_still = time.monotonic() - last_change > self.seconds
            is_free = state.released or stands_still or state.owner.host == self.owner.host
            if is_free and self._take(highest + 1):
                HELD[self.name] = self.token
                return self.token
            if not announced and not state.released:
                on_wait(state.owner)
                announced = True
            time.sleep(min(poll, self.seconds / 4))

    def release(self) -> None:
        """Give the lease back; harmless when it is no longer held."""
        HELD.pop(self.name, None)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_ours():
            with suppress(OSError):
                self._write(released=True)

    def is_ours(self) -> bool:
        """Return whether no process has taken the lease since."""
        return highest_token(self.locks, self.name) == self.token

    def _take(self, token: int) -> bool:
        """Create the lease file numbered `token`; return whether that made the lease ours.

        The exclusive create decides among the processes that try. A number below a newer lease's gives no right: it is
        free only because the newer owner removed the older files.
        """
        try:
            os.close(os.open(self._path(token), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        self.token = token
        if not self.is_ours():
            self._path(token).unlink(missing_ok=True)
            return False
        self._write()
        for number in tokens(self.locks, self.name):
            if number < token:
                self._path(number).unlink(missing_ok=True)
        self._stop.clear()
        self._thread = threading.Thread(target=self._renew, daemon=True, name=f"lease-{self.name}")
        self._thread.start()
        return True

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 5):
            self._beat += 1
            with suppress(OSError):  # the filesystem is away for a moment; the fence decides, not this thread
                if not self.is_ours():
                    return
                self._write()

    def _write(self, released: bool = False) -> None:
        body = {"owner": self.owner._asdict(), "beat": self._beat, "released": released}
        with open(self._path(self.token), "r+", encoding="utf-8") as file:
            file.write(json.dumps(body))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def _path(self, token: int) -> Path:
        return self.locks / f"{self.name}.lease-{token:08d}"


class _State(NamedTuple):
    """What a lease file says."""

    owner: LockOwner = LockOwner()
    beat: object = None
    released: bool = False


def _read_state(path: Path) -> _State:
    """Return the content of a lease file; the default for one that is being written, or was cut by a crash."""
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _State()
    if not isinstance(state, dict):
        return _State()
    fields = cast(dict[str, object], state)
    return _State(LockOwner.from_json(fields.get("owner")), fields.get("beat"), bool(fields.get("released")))


def tokens(locks: Path, name: str) -> list[int]:
    """Return the numbers of the lease files of `name`, ascending."""
    prefix = f"{name}.lease-"
    try:
        suffixes = [entry.removeprefix(prefix) for entry in os.listdir(locks) if entry.startswith(prefix)]
    except FileNotFoundError:
        return []
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def highest_token(locks: Path, name: str) -> int:
    """Return the token that counts; 0 if `name` was never leased."""
    return max(tokens(locks, name), default=0)


def inherited_environment(name: str) -> dict[str, str]:
    """Return the variables that the processes which build `name` must inherit, so that the fence stops them too."""
    if name in HELD:
        return {FENCE: f"{name}:{HELD[name]}"}
    return {}


def check_fence(root: Path, name: str) -> None:
    """Raises: ArtifactError if this process builds `name` under a lease that another process has taken over."""
    inherited, _, number = os.environ.get(FENCE, "").rpartition(":")
    token = HELD.get(name, 0)
    if not token and inherited == name:
        token = int(number)
    if not token:
        return
    highest = highest_token(root / "locks", name)
    if highest != token:
        raise ArtifactError(
            f"{name}: this process held lease {token} and stood still for longer than {SECONDS}; "
            f"lease {highest} has taken over. Nothing more is written here; run again to use what its owner builds"
        )
