"""Stages - where the ranks of several machines meet: the first node writes its address into the artifact's directory, the others read it.

Every node runs the same command. Which one it is comes from SELFPLAY_NODE_RANK (set by the pipeline's engines), SLURM_NODEID or
JOB_COMPLETION_INDEX (a Kubernetes indexed job), or from the place of its name or address in a hostfile (SELFPLAY_HOSTFILE: one host per line, as
DeepSpeed reads it). The first node locks what it wrote for as long as it lives, so that nobody joins a meeting of yesterday; on a file system without
locks, SELFPLAY_RENDEZVOUS does that, equal on all nodes and new for each start.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from data_contracts import lease
from data_contracts.errors import ConfigError, TransientError
from data_contracts.store import write_atomic

RANKS = ("SELFPLAY_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
STARTS = ("SELFPLAY_RENDEZVOUS", "SLURM_JOB_ID", "SELFPLAY_JOB_UID")
WAIT_SECONDS = 600.0


class Meeting(NamedTuple):
    address: str
    port: int


def node_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Which of the nodes this is; 0 where nobody says. Raises: ConfigError if a hostfile does not list it."""
    for name in RANKS:
        if name in environment:
            return int(environment[name])
    if hostfile := environment.get("SELFPLAY_HOSTFILE"):
        return _place_in(Path(hostfile), environment)
    return 0


def _place_in(hostfile: Path, environment: Mapping[str, str]) -> int:
    hosts = [line.split()[0] for line in hostfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    mine = {socket.gethostname(), socket.getfqdn(), environment.get("SELFPLAY_ADDRESS", "")}
    places = [number for number, host in enumerate(hosts) if host in mine]
    if len(places) != 1:
        raise ConfigError(
            f"{hostfile} lists {', '.join(hosts)}; this machine is {', '.join(sorted(mine - {''}))}: put it there once, or set SELFPLAY_ADDRESS to the name it has there"
        )
    return places[0]


def _file(out: Path) -> Path:
    start = next((os.environ[name] for name in STARTS if name in os.environ), "by-hand")
    return out / f".meeting-{start}.json"


@contextmanager
def announce(out: Path, nodes: int) -> Iterator[Meeting]:
    """On the first node: choose the address and a free port, and tell the others while the meeting lasts."""
    address = os.environ.get("SELFPLAY_ADDRESS") or os.environ.get("MASTER_ADDR") if nodes > 1 else "127.0.0.1"
    address = address or socket.gethostname()
    with socket.socket() as probe:
        probe.bind(("", 0) if nodes > 1 else ("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = Meeting(address, int(os.environ.get("MASTER_PORT", port)) if nodes > 1 else port)
    if nodes == 1:
        yield meeting
        return
    for old in out.glob(".meeting-*.json"):
        old.unlink(missing_ok=True)
    write_atomic(_file(out), json.dumps(meeting._asdict()))
    with open(_file(out), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield meeting


def join(out: Path, wait: float = WAIT_SECONDS) -> Meeting:
    """On every other node. Raises: TransientError if the first node does not call."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        try:
            with open(_file(out)) as file:
                if _is_held(file):
                    return Meeting(**json.load(file))
        except (OSError, ValueError, TypeError):
            pass
        time.sleep(0.5)
    raise TransientError(
        f"the first node has not said within {wait:.0f} s where to meet (no {_file(out)}): is it up, and is the store shared?"
    )


def _is_held(file: TextIO) -> bool:
    """Whether the first node still lives; under leases flock says nothing of another machine."""
    if lease.is_wanted():
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
