"""Contracts - a lease with fencing: who may build an artifact, where the kernel's locks do not reach from host to host.

    <root>/locks/<kind>-<key>.lease-00000007      {"owner": ..., "beat": 42, "released": false}; the highest number counts

flock is the lock of one host. On a shared filesystem that does not carry it to the others (NFS mounted with `nolock` or `local_lock=flock`,
most FUSE mounts) set SELFPLAY_LOCKS=lease. To hold the lease is to have made the file with the highest number, the *token*, by an exclusive
create; its owner rewrites it several times per lease time. Whoever waits reads it: a number that has not moved for a whole lease time, by
the reader's own clock, has no owner any more. No two clocks are ever compared. An owner that slept and was taken for dead finds a higher token than its own and
may neither write a shard nor sign (`check`): the fence.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_contracts.errors import ArtifactError, ConfigError

MODE, SECONDS, FENCE = "SELFPLAY_LOCKS", "SELFPLAY_LEASE_SECONDS", "SELFPLAY_FENCE"
DEFAULT_SECONDS = 120.0
"""Longer than a minute: NFS clients may answer from their cache for so long."""


def is_wanted() -> bool:
    """Whether locks go beyond this host. Raises: ConfigError."""
    mode = os.environ.get(MODE) or "flock"
    if mode not in ("flock", "lease"):
        raise ConfigError(
            f"{MODE} is {mode!r}: it must be flock (one host, or a filesystem that carries flock) or lease (any shared one)"
        )
    return mode == "lease"


def lease_seconds() -> float:
    text = os.environ.get(SECONDS) or str(DEFAULT_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{SECONDS} is {text!r}: it must be a number of seconds above 0")
    return seconds


HELD: dict[str, int] = {}
"""Artifact -> token, of the leases of this process."""


class Lease:
    """The right to build one artifact, on every host that sees the directory."""

    def __init__(self, locks: Path, name: str, owner: dict[str, Any], seconds: float | None = None):
        self.locks, self.name, self.owner = locks, name, owner
        self.seconds = seconds or lease_seconds()
        self.token = 0
        self._beat, self._stop = 0, threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, waiting: Callable[[str], None], poll: float) -> int:
        """Block until it is ours; the token. `waiting(owner)` is called once."""
        told, seen, since = False, None, time.monotonic()
        while True:
            highest = highest_token(self.locks, self.name)
            state = _read(self._path(highest)) if highest else {"released": True}
            if state != seen:
                seen, since = state, time.monotonic()
            # One of this host's own is dead: the caller holds the host's flock.
            dead = state.get("owner", {}).get("host") == self.owner["host"] or time.monotonic() - since > self.seconds
            if (state.get("released") or dead) and self._take(highest + 1):
                HELD[self.name] = self.token
                return self.token
            if not told and not state.get("released"):
                waiting(json.dumps(state.get("owner", {})))
                told = True
            time.sleep(min(poll, self.seconds / 4))

    def release(self) -> None:
        HELD.pop(self.name, None)
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_ours():
            with suppress(OSError):
                self._write(released=True)

    def is_ours(self) -> bool:
        return highest_token(self.locks, self.name) == self.token

    def _take(self, token: int) -> bool:
        """Exclusive creation decides among those who want it. A number below a newer one's was freed by a tidy owner: no right."""
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
        self._thread = threading.Thread(target=self._keep, daemon=True, name=f"lease-{self.name}")
        self._thread.start()
        return True

    def _keep(self) -> None:
        while not self._stop.wait(self.seconds / 5):
            self._beat += 1
            with suppress(OSError):  # away for a moment; the fence decides, not this thread
                if not self.is_ours():
                    return
                self._write()

    def _write(self, released: bool = False) -> None:
        with open(self._path(self.token), "r+", encoding="utf-8") as file:
            file.write(json.dumps({"owner": self.owner, "beat": self._beat, "released": released}))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def _path(self, token: int) -> Path:
        return self.locks / f"{self.name}.lease-{token:08d}"


def tokens(locks: Path, name: str) -> list[int]:
    prefix = f"{name}.lease-"
    try:
        names = os.listdir(locks)
    except FileNotFoundError:
        return []
    return sorted(int(one[len(prefix) :]) for one in names if one.startswith(prefix) and one[len(prefix) :].isdigit())


def highest_token(locks: Path, name: str) -> int:
    return max(tokens(locks, name), default=0)


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # just being written, or cut: only its standing still counts
    return state if isinstance(state, dict) else {}


def environment(name: str) -> dict[str, str]:
    """What the processes that build `name` for us must inherit."""
    return {FENCE: f"{name}:{HELD[name]}"} if name in HELD else {}


def check(root: Path, name: str) -> None:
    """The fence: raises ArtifactError if this process builds `name` under a lease that somebody else has taken over."""
    inherited, _, number = os.environ.get(FENCE, "").rpartition(":")
    token = HELD.get(name) or (int(number) if inherited == name else 0)
    if token and (highest := highest_token(root / "locks", name)) != token:
        raise ArtifactError(
            f"{name}: this process held lease {token} and stood still for longer than {SECONDS}; lease {highest} has taken over. "
            "Nothing more is written here; run again to share in what the other one makes"
        )
