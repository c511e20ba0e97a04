"""Stages - how ranks on several nodes meet: node 0 writes its address into the artifact's directory, others read it.

Every node runs the same command. Its number comes from SELFPLAY_NODE_RANK (set by the pipeline's engines), SLURM_NODEID
or JOB_COMPLETION_INDEX (a Kubernetes indexed job), or from the line of a hostfile that has its name or address
(SELFPLAY_HOSTFILE: one host per line, as DeepSpeed reads it). Node 0 locks the address file while it lives, so that no
node joins an earlier, dead training; on a file system without locks, SELFPLAY_RENDEZVOUS prevents that: a word equal on
all nodes and new for each start.
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
from data_contracts.files import write_atomic

RANKS = ("SELFPLAY_NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
STARTS = ("SELFPLAY_RENDEZVOUS", "SLURM_JOB_ID", "SELFPLAY_JOB_UID")
WAIT_SECONDS = 600.0


class Meeting(NamedTuple):
    """Where the ranks connect: torch's MASTER_ADDR and MASTER_PORT."""

    address: str
    port: int


def node_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this node, from 0; 0 if no variable says.

    Raises: ConfigError if the hostfile does not list it exactly once.
    """
    for name in RANKS:
        if name in environment:
            return int(environment[name])
    if hostfile := environment.get("SELFPLAY_HOSTFILE"):
        return _line_of_this_host(Path(hostfile), environment)
    return 0


def _line_of_this_host(hostfile: Path, environment: Mapping[str, str]) -> int:
    hosts = [line.split()[0] for line in hostfile.read_text().splitlines() if line.strip() and not line.startswith("#")]
    names = {socket.gethostname(), socket.getfqdn(), environment.get("SELFPLAY_ADDRESS", "")}
    lines = [number for number, host in enumerate(hosts) if host in names]
    if len(lines) != 1:
        raise ConfigError(
            f"{hostfile} lists {', '.join(hosts)}; this machine is {', '.join(sorted(names - {''}))}: "
            "put it there once, or set SELFPLAY_ADDRESS to the name it has there"
        )
    return lines[0]


def _meeting_path(out: Path) -> Path:
    start = next((os.environ[name] for name in STARTS if name in os.environ), "by-hand")
    return out / f".meeting-{start}.json"


@contextmanager
def announce(out: Path, nodes: int) -> Iterator[Meeting]:
    """On node 0: yield this node's address and a free port; other nodes can `join` until the block ends."""
    if nodes == 1:
        yield Meeting("127.0.0.1", _free_port("127.0.0.1"))
        return
    address = os.environ.get("SELFPLAY_ADDRESS") or os.environ.get("MASTER_ADDR") or socket.gethostname()
    meeting = Meeting(address, int(os.environ.get("MASTER_PORT") or _free_port("")))
    for earlier in out.glob(".meeting-*.json"):
        earlier.unlink(missing_ok=True)
    path = _meeting_path(out)
    write_atomic(path, json.dumps(meeting._asdict()))
    with open(path, "a") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        yield meeting


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def join(out: Path, wait: float = WAIT_SECONDS) -> Meeting:
    """On every other node: wait for node 0 and return its address. Raises: TransientError after `wait` seconds."""
    path = _meeting_path(out)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        try:
            with open(path) as file:
                if _is_locked(file):
                    return Meeting(**json.load(file))
        except (OSError, ValueError, TypeError):
            pass
        time.sleep(0.5)
    raise TransientError(
        f"the first node has not said within {wait:.0f} s where to meet (no {path}): is it up, and is the store shared?"
    )


def _is_locked(file: TextIO) -> bool:
    """Whether node 0 still lives. Under leases flock does not reach other machines: assume that it does."""
    if lease.is_enabled():
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
