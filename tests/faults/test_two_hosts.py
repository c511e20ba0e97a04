"""Two hosts, one store: each artifact is built once; who waits says for whom; a dead owner is noticed; a sleeper cannot overwrite.

Strategy: a host is a network and a hostname namespace of its own (`unshare --net --uts`), so nothing but the directory connects the two. Once
with the kernel's locks, which such hosts share, and once with leases alone: there every host has a lock file of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.lease import (
    FENCE,
    HELD,
    MODE,
    SECONDS,
    Lease,
    LockOwner,
    check_fence,
    highest_token,
    inherited_environment,
    is_enabled,
    lease_seconds,
    tokens,
)
from data_contracts.store import Store
from stages.running.history import events
from tests.faults.harness import Command, contents, judge

OWN_HOST = ["unshare", "--net", "--uts", "sh", "-c", 'ip link set lo up && hostname "$0" && exec "$@"']
LEASE = {MODE: "lease", SECONDS: "3"}


@pytest.fixture(scope="module")
def host():
    """host(name) -> the words before a command that run it on a host of its own."""
    done = (
        subprocess.run([*OWN_HOST, "probe", "hostname"], capture_output=True, text=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if done is None or done.stdout.strip() != "probe":
        pytest.skip("network namespaces cannot be made here: this needs root and unshare(1)")
    return lambda name: [*OWN_HOST, name]


def starts(store: Path) -> list[int]:
    store = Store(store)
    return [
        sum(event["event"] == "start" for event in events(store.directory(record.kind, record.key)))
        for record in store.records()
        if record.stage != "prompts"
    ]


def is_stopped(struck: Path) -> bool:
    """The stage has taken the fault, and stands still."""
    try:
        return (
            Path(f"/proc/{json.loads(struck.read_text())['pid']}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
        )
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize("locks", [{}, LEASE], ids=["flock", "lease"])
def test_two_hosts_that_want_the_same_build_each_artifact_once(scenes, host, tmp_path, locks):
    scene, store = scenes["score"], tmp_path / "store"
    shutil.copytree(scenes["sample"].before, store, symlinks=True)
    commands = [Command(scene.steps, store, tmp_path, host(name), **locks) for name in ("host-a", "host-b")]
    ended = [command.end() for command in commands]
    assert [one.code for one in ended] == [0, 0], ended
    assert contents(ended[0].out) == contents(ended[1].out) == scene.wanted
    assert starts(store) == [1, 1]
    waited = [one.out for one in ended if "is being built by" in one.out]
    assert waited and all(" on host-" in out for out in waited)
    for out, other in ((ended[0].out, "host-b"), (ended[1].out, "host-a")):
        assert all(other in line for line in out.splitlines() if "is being built by" in line)
    assert judge(scene, store, ended[0]) == []


def test_a_host_that_died_is_taken_over_after_its_lease(scenes, host, tmp_path):
    scene, store = scenes["sample"], tmp_path / "store"
    shutil.copytree(scene.before, store, symlinks=True)
    first = Command(scene.steps, store, tmp_path, host("host-a"), **LEASE)
    deadline = time.monotonic() + 60
    while not list(store.glob("artifacts/generations/*/.events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in first.tree():  # the power of the whole host goes
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    first.end()
    began = time.monotonic()
    ended = Command(scene.steps, store, tmp_path, host("host-b"), **LEASE).end()
    assert judge(scene, store, ended) == [], ended.out
    assert "on host-a since" in ended.out and time.monotonic() - began > float(LEASE[SECONDS])


def test_a_host_that_slept_through_its_lease_writes_nothing_any_more(scenes, host, tmp_path):
    scene, store = scenes["sample"], tmp_path / "store"
    shutil.copytree(scene.before, store, symlinks=True)
    at = 1 + next(i for i, (what, path) in enumerate(scene.changes) if what == "open" and "part-00001" in path)
    fault = f'{{"under": "{store}", "module": "stages", "once": "{tmp_path}/struck", "do": "stop", "at": {at}}}'
    sleeper = Command(scene.steps, store, tmp_path, host("host-a"), FAULT=fault, **LEASE)
    deadline = time.monotonic() + 60
    while not is_stopped(tmp_path / "struck") and time.monotonic() < deadline:
        time.sleep(0.02)
    tree = sleeper.tree()
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    try:
        ended = Command(scene.steps, store, tmp_path, host("host-b"), **LEASE).end()
        signed = {path: path.read_bytes() for path in store.glob("artifacts/generations/*/record.json")}
    finally:
        for pid in tree:
            os.kill(pid, signal.SIGCONT)
        late = sleeper.end()
    assert judge(scene, store, ended) == [], ended.out
    assert late.code == 4 and "lease 2 has taken over. Nothing more is written here" in late.out, late.out
    assert signed == {path: path.read_bytes() for path in store.glob("artifacts/generations/*/record.json")}
    again = Command(scene.steps, store, tmp_path, host("host-a"), **LEASE).end()
    # The shard that was half written when it fell asleep is equal here; were it not, its digest would tell.
    assert judge(scene, store, again, redone=2) == [], again.out


# --- the lease itself


def lease(directory: Path, host: str, seconds: float = 1.0) -> Lease:
    return Lease(directory, "generations-k", LockOwner(1, host), seconds)


def test_a_lease_is_held_by_one_and_passed_on_when_it_is_released(tmp_path):
    first, second, told = lease(tmp_path, "a"), lease(tmp_path, "b"), []
    assert first.acquire(told.append, 0.01) == 1 and first.is_ours()

    class Waits(Exception):
        pass

    def waiting(owner):
        told.append(owner)
        raise Waits

    with pytest.raises(Waits):
        second.acquire(waiting, 0.01)
    assert told == [LockOwner(1, "a")]
    first.release()
    assert second.acquire(told.append, 0.01) == 2 and not first.is_ours() and tokens(tmp_path, "generations-k") == [2]
    second.release()


def test_a_living_owner_is_never_taken_for_dead(tmp_path):
    first, second = lease(tmp_path, "a", 0.4), lease(tmp_path, "b", 0.4)
    first.acquire(print, 0.01)
    began, until = time.monotonic(), []

    import threading

    thread = threading.Thread(
        target=lambda: until.append((second.acquire(lambda _: None, 0.02), time.monotonic() - began))
    )
    thread.start()
    time.sleep(2.0)  # five lease times
    assert until == []
    first.release()
    thread.join(10)
    assert until[0][0] == 2 and until[0][1] >= 2.0
    second.release()


def test_one_of_many_takes_a_dead_ones_place(tmp_path):
    import threading

    dead = lease(tmp_path, "a", 0.3)
    dead.acquire(print, 0.01)
    dead._stop.set()  # its heart stops
    inside, most, order = [], [], []

    def want(name: str) -> None:
        mine = lease(tmp_path, name, 0.3)
        mine.acquire(lambda _: None, 0.01)
        inside.append(name)
        most.append(len(inside))
        time.sleep(0.1)
        order.append(mine.token)
        inside.remove(name)
        mine.release()

    threads = [threading.Thread(target=want, args=(f"h{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and order == sorted(order) and len(order) == 6


def test_the_fence_stops_who_lost_the_lease(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setenv(MODE, "lease")
    monkeypatch.setenv(SECONDS, "5")
    check_fence(tmp_path, "generations-k")  # without a lease there is no fence
    with store.lock("generations", "k"):
        assert (
            inherited_environment("generations-k") == {FENCE: "generations-k:1"}
            and inherited_environment("other") == {}
        )
        check_fence(tmp_path, "generations-k")
        (tmp_path / "locks" / "generations-k.lease-00000002").write_text("{}")
        with pytest.raises(
            ArtifactError,
            match="held lease 1 and stood still for longer than SELFPLAY_LEASE_SECONDS; lease 2 has taken over",
        ):
            check_fence(tmp_path, "generations-k")
        HELD.clear()
        monkeypatch.setenv(FENCE, "generations-k:2")
        check_fence(tmp_path, "generations-k")
        monkeypatch.setenv(FENCE, "generations-k:1")
        with pytest.raises(ArtifactError, match="lease 2"):
            check_fence(tmp_path, "generations-k")
        with pytest.raises(ArtifactError, match="held lease 1"):
            check_fence(tmp_path / "a disk that went away", "generations-k")
    assert highest_token(tmp_path / "locks", "generations-k") == 2


@pytest.mark.parametrize("text", ["never", "0", "-3", "nan", "inf"])
def test_a_lease_time_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(SECONDS, text)
    with pytest.raises(ConfigError, match="SELFPLAY_LEASE_SECONDS is"):
        lease_seconds()
    assert not is_enabled()
