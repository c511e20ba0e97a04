"""The store: an artifact is found when it is finished and intact, by one builder at a time, whatever dies in between.

Strategy: artifacts of one small text file; crashes are real (SIGKILL of a process that holds a lock) or an exception in
the one call that would have made the change visible.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import data_contracts.store
from data_contracts.artifact import RECORD, ArtifactRecord, ArtifactRef, FileDigest
from data_contracts.errors import ArtifactError, ConfigError
from data_contracts.files import write_atomic
from data_contracts.lease import LockOwner
from data_contracts.mirror import Mirror
from data_contracts.store import Store, content_digest, data_files

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef"


def record(key: str = KEY, kind: str = "generations") -> ArtifactRecord:
    return ArtifactRecord(
        kind=kind, key=key, stage="sample", version="1", config={}, inputs={}, content="", files=[], rows=0
    )


def make(store: Store, key: str = KEY, text: str = "hello", kind: str = "generations") -> ArtifactRecord:
    directory = store.directory(kind, key)
    directory.mkdir(parents=True)
    (directory / "data.txt").write_text(text)
    return store.sign(record(key, kind))


# --- finding


def test_a_signed_artifact_is_found_with_its_content(store):
    signed = make(store)
    ref = store.find("generations", KEY)
    assert ref == signed.ref(str(store.directory("generations", KEY)))
    assert ref.content == content_digest(
        [FileDigest(name="data.txt", size=5, sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")]
    )
    assert store.load(ref.kind, ref.key) == signed


def test_inputs_are_found_by_kind_and_key_wherever_the_store_lies(store, tmp_path):
    def ref(kind: str, key: str) -> ArtifactRef:
        return ArtifactRef(kind=kind, key=key, path="/old/place", content="c")

    inputs = {
        "prompts": ref("prompts", "a1"),
        "policy": ref("checkpoint", "b2/steps/000004"),
        "teacher": ref("checkpoint", "external"),
    }
    directory = store.directory("generations", "k")
    directory.mkdir(parents=True)
    (directory / "part").write_text("x")
    store.sign(
        ArtifactRecord(
            kind="generations", key="k", stage="t", version="1", config={}, inputs=inputs, content="", files=[], rows=1
        )
    )
    moved = Store(store.root.rename(tmp_path / "elsewhere"))
    record = moved.load("generations", "k")
    assert {name: ref.path for name, ref in record.inputs.items()} == {
        "prompts": f"{moved.root}/artifacts/prompts/a1",
        "policy": f"{moved.root}/artifacts/checkpoint/b2/steps/000004",
        "teacher": "/old/place",
    }
    mirror, other = Mirror(f"file://{tmp_path}/mirror"), Store(tmp_path / "another" / "machine")
    assert mirror.push(moved, record)
    fetched = mirror.fetch(other, "generations", "k")
    assert fetched.inputs["prompts"].path == f"{other.root}/artifacts/prompts/a1" and fetched == other.load(
        "generations", "k"
    )


def test_opening_a_store_and_looking_for_something_writes_nothing(store):
    assert store.find("generations", KEY) is None
    assert store.load("generations", KEY) is None
    assert list(store.records()) == []
    store.check_writable()
    assert not store.root.exists()


def test_unfinished_work_is_not_found(store):
    directory = store.directory("generations", KEY)
    directory.mkdir(parents=True)
    (directory / "part-00000.parquet").write_bytes(b"whole shard")
    assert store.find("generations", KEY) is None
    assert list(store.records()) == []


def test_a_crash_while_signing_leaves_unfinished_work(store, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data_contracts.store.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        make(store)
    assert store.find("generations", KEY) is None
    assert (store.directory("generations", KEY) / "data.txt").is_file()


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("hell"), lambda path: path.write_text("hello!")]
)
def test_an_artifact_with_a_missing_or_resized_file_is_not_found(store, damage):
    signed = make(store)
    damage(store.directory("generations", KEY) / "data.txt")
    assert store.find("generations", KEY) is None
    assert len(store.problems(signed)) == 1 and "data.txt" in store.problems(signed)[0]


def test_a_changed_byte_is_found_at_once_in_a_small_file_and_by_a_deep_look_in_a_large_one(store, monkeypatch):
    signed = make(store)
    (store.directory("generations", KEY) / "data.txt").write_text("hallo")
    assert (
        store.problems(signed) == ["data.txt has other content than was signed"]
        and store.find("generations", KEY) is None
    )
    monkeypatch.setattr(data_contracts.store, "QUICK_BYTES", 3)
    assert store.problems(signed) == []
    assert store.problems(signed, deep=True) == ["data.txt has other content than was signed"]


def test_a_damaged_record_is_not_found_and_says_where_it_lies(store):
    make(store)
    path = store.directory("generations", KEY) / RECORD
    path.write_text(path.read_text()[:40])
    assert store.find("generations", KEY) is None
    with pytest.raises(ArtifactError, match=f"generations {KEY}: record.json is damaged.*it lies in {path.parent}"):
        store.load("generations", KEY)


def test_an_artifact_without_files_is_not_signed(store):
    store.directory("generations", KEY).mkdir(parents=True)
    with pytest.raises(ArtifactError, match="ended without writing any file"):
        store.sign(record())


def test_a_crash_while_discarding_leaves_no_signed_ruin(store, monkeypatch):
    make(store)
    monkeypatch.setattr(data_contracts.store.shutil, "rmtree", lambda *a, **k: None)
    store.discard("generations", KEY)
    assert store.load("generations", KEY) is None


# --- content


def test_content_depends_on_names_and_bytes_and_not_on_order():
    first, second = (FileDigest(name=name, size=1, sha256=name * 64) for name in "ab")
    assert content_digest([first, second]) == content_digest([second, first])
    assert content_digest([first]) != content_digest([first.model_copy(update={"name": "b"})])
    assert content_digest([first]) != content_digest([first.model_copy(update={"sha256": "b" * 64})])


def test_logs_records_hidden_temporary_and_resume_files_are_no_content(store):
    directory = store.directory("checkpoint", KEY)
    for name in (
        "model.safetensors",
        "sub/more.json",
        "stage.log",
        "spec.json",
        "metrics.jsonl",
        ".events.jsonl",
        ".part.tmp-7",
        "resume/step2/x.pt",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    assert [path.relative_to(directory).as_posix() for path in data_files(directory)] == [
        "model.safetensors",
        "sub/more.json",
    ]


def test_equal_data_has_equal_content_under_another_key(store):
    assert make(store, "a" * 16).content == make(store, "b" * 16).content != make(store, "c" * 16, "other").content


# --- names


def test_the_start_of_a_key_is_enough_if_it_is_the_start_of_one_key(store):
    make(store, "aa11" + "0" * 12)
    make(store, "aa22" + "0" * 12)
    make(store, "bb11" + "0" * 12, kind="checkpoint")
    assert store.resolve("aa1").key.startswith("aa11")
    assert store.resolve("checkpoint/b").kind == "checkpoint"
    with pytest.raises(ConfigError, match=r"'aa' is the start of 2 keys: generations/aa11.*generations/aa22"):
        store.resolve("aa")
    for text in ("cc", "generations/bb", "*", "/no/such/directory"):
        with pytest.raises(ConfigError, match="no artifact in .* has a key that starts with"):
            store.resolve(text)


def test_another_artifacts_damaged_record_is_in_nobodys_way(store):
    make(store, "aa11" + "0" * 12)
    make(store, "bb11" + "0" * 12)
    (store.directory("generations", "bb11" + "0" * 12) / RECORD).write_text("{")
    assert store.resolve("aa").key.startswith("aa11")
    assert [record.key[:4] for record in store.records()] == ["aa11"]


def test_a_run_shows_its_artifacts_by_name(store):
    first = make(store, "a" * 16, "one").ref(str(store.directory("generations", "a" * 16)))
    second = make(store, "b" * 16, "two").ref(str(store.directory("generations", "b" * 16)))
    store.show_in_run("quickstart", "iter_01", "sample", first)
    link = store.root / "runs" / "quickstart" / "iter_01" / "sample"
    assert (link / "data.txt").read_text() == "one"
    assert not os.path.isabs(os.readlink(link))  # the store may be moved
    store.show_in_run("quickstart", "iter_01", "sample", second)
    assert (link / "data.txt").read_text() == "two"
    assert [path.name for path in link.parent.iterdir()] == ["sample"]


def test_a_link_is_replaced_in_one_step(store):
    refs = [make(store, c * 16, c).ref(str(store.directory("generations", c * 16))) for c in "ab"]
    link = store.root / "runs" / "r" / "iter_01" / "sample"
    store.show_in_run("r", "iter_01", "sample", refs[0])
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add((link / "data.txt").read_text() if link.exists() else "gone")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        store.show_in_run("r", "iter_01", "sample", refs[number % 2])
    done.set()
    reader.join()
    assert seen <= {"a", "b"}


# --- writing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomic(path, "old")
    monkeypatch.setattr(
        data_contracts.store.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_a_writer_removes_what_killed_writers_of_the_file_left_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    names = {f".report.md.tmp-{host}-{dead.pid}": False, f".report.md.tmp-{host}-{os.getppid()}": True}
    names |= {f".report.md.tmp-elsewhere-{dead.pid}": True, f".other.md.tmp-{host}-{dead.pid}": True}
    for name in names:
        (tmp_path / name).write_text("half a")
    write_atomic(tmp_path / "report.md", "a report")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_a_signature_removes_what_killed_writers_left_in_the_artifact(store):
    directory = store.directory("prompts", "a" * 16)
    directory.mkdir(parents=True)
    (directory / ".part-00000.parquet.tmp-elsewhere-1").write_text("half a shard")
    (directory / "part-00000.parquet").write_text("a shard")
    store.sign(record("a" * 16, "prompts"))
    assert sorted(path.name for path in directory.iterdir()) == ["part-00000.parquet", RECORD]


def test_a_store_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(ConfigError, match=f"{tmp_path}/file is a file"):
            Store(path).check_writable()


def test_a_store_where_nothing_can_be_written_is_refused():
    with pytest.raises(ConfigError, match="not writable"):
        Store("/proc/store").check_writable()


# --- locks

HOLD = """
import subprocess, sys, time
from data_contracts.store import Store
with Store(sys.argv[1]).lock("generations", "k") as lock:
    if sys.argv[2] == "child":
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
        print(child.pid, flush=True)
    else:
        print("held", flush=True)
    time.sleep(60)
"""


def hold(store: Store, what: str = "") -> tuple[subprocess.Popen, str]:
    """A process that holds the lock, and the line it printed once it did."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store.root), what], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process.stdout as lines:
        return process, lines.readline().strip()


def is_held(store: Store) -> bool:
    def give_up(_owner: LockOwner) -> None:
        raise TimeoutError

    try:
        with store.lock("generations", "k", give_up):
            return False
    except TimeoutError:
        return True


def test_a_second_builder_waits_and_is_told_for_whom(store):
    process, _ = hold(store)
    owners = []

    def waiting(owner: LockOwner) -> None:
        owners.append(owner)
        process.kill()

    try:
        with store.lock("generations", "k", waiting, poll=0.01):
            assert [owner.pid for owner in owners] == [process.pid]
    finally:
        process.kill()
        process.wait()


def test_the_kernel_drops_the_lock_of_a_process_that_was_killed(store):
    process, _ = hold(store)
    assert is_held(store)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_held(store)


def test_a_child_that_inherited_the_lock_keeps_it_when_its_parent_is_killed(store):
    process, child = hold(store, "child")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert is_held(store)
    os.kill(int(child), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while is_held(store) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_held(store)


def test_locks_of_different_artifacts_do_not_meet(store):
    with store.lock("generations", "k"), store.lock("generations", "other"), store.lock("scored_pairs", "k"):
        assert is_held(store)
    assert not is_held(store)


def test_two_threads_of_one_process_exclude_each_other(store):
    inside, most = [], []

    def work() -> None:
        with store.lock("generations", "k", poll=0.005):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
