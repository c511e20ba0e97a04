"""Artifacts in an object store: the record last, digests checked, nothing mixed, the local store an emptiable cache.

Strategy: what does not depend on S3 is shown on a directory behind the same interface; the real protocol is spoken to
moto's server (slow; skipped where `moto_server` is not in SELFPLAY_TOOLS or on PATH, or ends a multipart upload in a
way that no AWS SDK understands, as moto 5.2.0 and 5.2.1 do).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_contracts.artifact import RECORD
from data_contracts.checkpoint import external_model
from data_contracts.errors import ArtifactError, ConfigError, TransientError
from data_contracts.mirror import MIRROR, Mirror, evict, main
from data_contracts.shards import read_shard, read_shards, shard_path, write_shard
from data_contracts.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def moto(tmp_path):
    """An S3 server with a bucket: `.url` for a mirror, `.log` of its requests, `.ask(method, path, body)`."""
    command = shutil.which("moto_server", path=f"{os.environ.get('SELFPLAY_TOOLS', '')}:{os.environ['PATH']}")
    if command is None:
        pytest.skip("moto_server is not installed (pip install 'moto[server]>=5.2.2'; SELFPLAY_TOOLS or PATH)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "moto.log"
    with open(log, "wb") as file:
        server = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=file)

    def ask(method: str, path: str, body: bytes = b"") -> str:
        headers = {"Content-Type": "application/xml"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}", data=body or None, headers=headers, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode() + answer.headers.get("ETag", "")

    try:
        end = time.monotonic() + 60
        while True:
            try:
                ask("PUT", "bucket")
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.3)
        if "<CompleteMultipartUploadResult" not in _multipart(ask):
            pytest.skip(
                f"{command} answers CompleteMultipartUpload under another name (getmoto/moto#10055): take moto 5.2.2 or later"
            )
        url = f"s3://test:test@bucket/selfplay?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield SimpleNamespace(url=url, log=log, ask=ask)
    finally:
        server.terminate()
        server.wait(10)


def _multipart(ask) -> str:
    """The server's answer at the end of an upload in parts. An AWS SDK that misses its name asks until it gives up."""
    upload = re.search(r"<UploadId>([^<]+)", ask("POST", "bucket/probe?uploads"))[1]
    tag = ask("PUT", f"bucket/probe?partNumber=1&uploadId={upload}", b"x")
    parts = (
        f"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber><ETag>{tag}</ETag></Part></CompleteMultipartUpload>"
    )
    return ask("POST", f"bucket/probe?uploadId={upload}", parts.encode())


@pytest.fixture
def address(tmp_path) -> str:
    (tmp_path / "objects").mkdir()
    return f"file://{tmp_path}/objects"


def artifact(store: Store, make_prompts, count: int = 3):
    ref = make_prompts(store, count)
    return store.load("prompts", ref.key)


def big_artifact(store: Store, record, size: int):
    """A signed checkpoint of `size` random bytes; parts of an upload are 10 MiB, so 24 MiB are three."""
    directory = store.directory("checkpoint", "c" * 16)
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(os.urandom(size))
    return store.sign(record.model_copy(update={"kind": "checkpoint", "key": "c" * 16, "files": [], "content": ""}))


def round_trip(url: str, store: Store, record, tmp_path: Path) -> None:
    mirror = Mirror(url)
    assert mirror.load("prompts", record.key) is None
    assert mirror.fetch(Store(tmp_path / "none"), "prompts", record.key) is None
    assert mirror.push(store, record)
    assert not mirror.push(store, record)  # it is there
    other = Store(tmp_path / "other")
    fetched = mirror.fetch(other, "prompts", record.key)
    assert fetched == record == other.load("prompts", record.key)
    assert not other.problems(fetched, deep=True)


def test_an_artifact_comes_back_as_it_went(store, address, make_prompts, tmp_path):
    round_trip(address, store, artifact(store, make_prompts), tmp_path)


BUILD = """
import json, sys
from data_contracts.artifact import ArtifactRef
from data_contracts.store import Store
from stages.sampling.stage import SamplingConfig
from tasks.build import build

root, prompts, policy = sys.argv[1:]
settings = {"backend": {"name": "canned"}, "max_new_tokens": 4, "max_prompt_tokens": 64, "runtime": {"device": "cpu"}}
config = SamplingConfig.model_validate(settings)
inputs = {"prompts": ArtifactRef.model_validate_json(prompts), "policy": ArtifactRef.model_validate_json(policy)}
built = build("sample", config, inputs, Store(root), lambda line: None)
print(json.dumps([built.cached, built.ref.key, built.ref.content]))
"""


def command(*words: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_artifacts_go_through_s3_and_come_back(store, moto, make_prompts, tmp_path, tiny_model):
    big_artifact(store, artifact(store, make_prompts), 24 << 20)
    mirror = ["-m", "data_contracts.mirror"]
    assert command(*mirror, "push", moto.url, "--store", str(store.root)).count(" was put into the mirror") == 2
    assert "partNumber=3" in moto.log.read_text()
    assert command(*mirror, "push", moto.url, "--store", str(store.root)).count(" is in the mirror already") == 2
    elsewhere = Store(tmp_path / "elsewhere")
    names = [f"{record.kind}/{record.key}" for record in store.records()]
    assert command(*mirror, "fetch", moto.url, *names, "--store", str(elsewhere.root)).count(" was fetched") == 2
    for record in elsewhere.records():
        assert record == store.load(record.kind, record.key) and not elsewhere.problems(record, deep=True)
    assert command(*mirror, "evict", moto.url, "--store", str(elsewhere.root)).count(" was deleted here") == 2
    # And through `build`: made on one machine, found on another that shares no file system with it.
    results = []
    for name in ("first", "second"):
        mine = Store(tmp_path / name)
        inputs = [make_prompts(mine, 4).model_dump_json(), external_model(tiny_model).model_dump_json()]
        results.append(json.loads(command("-c", BUILD, str(mine.root), *inputs, **{MIRROR: moto.url})))
    assert [cached for cached, *_ in results] == [False, True]
    assert results[0][1:] == results[1][1:]
    second = Store(tmp_path / "second")
    assert not second.problems(second.load("generations", results[1][1]), deep=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_push_killed_in_the_middle_of_an_upload_leaves_nothing_that_can_be_seen(store, moto, make_prompts, tmp_path):
    """The file is a pipe that is given two thirds of its bytes: the kill finds parts there, and the upload open."""
    record = big_artifact(store, artifact(store, make_prompts), 24 << 20)
    path = store.directory("checkpoint", record.key) / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    name, other = f"checkpoint/{record.key}", Store(tmp_path / "other")
    again = ["-m", "data_contracts.mirror", "push", moto.url, name, "--store", str(store.root)]
    fetch = ["-m", "data_contracts.mirror", "fetch", moto.url, name, "--store", str(other.root)]
    push = subprocess.Popen([sys.executable, *again], cwd=ROOT)
    with open(path, "wb", buffering=0) as pipe:
        for start in range(0, 17 << 20, 1 << 16):
            pipe.write(data[start : start + (1 << 16)])
        end = time.monotonic() + 60
        while not re.search(r"PUT \S+model.safetensors\?partNumber=1\S* HTTP/1.1\" 200", moto.log.read_text()):
            assert push.poll() is None and time.monotonic() < end, moto.log.read_text()[-2000:]
            time.sleep(0.05)
        push.send_signal(signal.SIGKILL)
        assert push.wait() == -signal.SIGKILL
    assert "<UploadId>" in moto.ask("GET", "bucket?uploads")  # what was sent is kept by the server, and shown to nobody
    assert "checkpoint" not in moto.ask("GET", "bucket?list-type=2")
    assert command(*fetch) == f"{name} is not there\n"
    assert not list(other.records()) and not (other.root / "artifacts").exists()
    path.unlink()
    path.write_bytes(data)
    assert command(*again) == f"{name} was put into the mirror\n"
    assert command(*fetch) == f"{name} was fetched\n"
    assert other.load("checkpoint", record.key) == record and not other.problems(record, deep=True)


def test_files_without_a_record_are_nothing(store, address, make_prompts, tmp_path):
    """A push that was killed before its last act."""
    record, mirror = artifact(store, make_prompts), Mirror(address)
    mirror.push(store, record)
    (tmp_path / "objects" / "artifacts" / "prompts" / record.key / RECORD).unlink()
    assert mirror.load("prompts", record.key) is None
    assert mirror.push(store, record)  # and once more, whole


def test_two_builds_of_one_key_never_mix(store, address, make_prompts, tmp_path):
    record, mirror = artifact(store, make_prompts), Mirror(address)
    mirror.push(store, record)
    other = Store(tmp_path / "other")
    shutil.copytree(store.directory("prompts", record.key), other.directory("prompts", record.key))
    (other.directory("prompts", record.key) / RECORD).unlink()
    (other.directory("prompts", record.key) / "more.txt").write_text("another build")
    second = other.sign(record.model_copy(update={"files": [], "content": ""}))
    assert second.content != record.content
    mirror.push(other, second)
    fresh = Store(tmp_path / "fresh")
    assert mirror.fetch(fresh, "prompts", record.key).content == second.content
    assert not fresh.problems(second, deep=True)
    assert (
        len([path for path in (tmp_path / "objects" / "artifacts" / "prompts" / record.key).iterdir() if path.is_dir()])
        == 2
    )


def test_what_is_fetched_takes_the_place_of_unfinished_work_that_was_cut_otherwise(
    store, address, make_prompts, tmp_path
):
    record, mirror = artifact(store, make_prompts, 4), Mirror(address)
    mirror.push(store, record)
    other = Store(tmp_path / "other")
    directory = other.directory("prompts", record.key)
    table = read_shard(shard_path(store.directory("prompts", record.key), 0), "prompts")
    for index in range(2):  # two of four shards, with their seals
        write_shard(shard_path(directory, index), table.slice(index, 1))
    (directory / "stage.log").write_text("what happened so far")
    mirror.fetch(other, "prompts", record.key)
    assert read_shards(directory, "prompts") == table
    assert (directory / "stage.log").is_file()


def test_what_was_damaged_on_the_way_is_not_signed(store, address, make_prompts, tmp_path):
    record, mirror = artifact(store, make_prompts), Mirror(address)
    mirror.push(store, record)
    path = tmp_path / "objects" / "artifacts" / "prompts" / record.key / record.content / record.files[0].name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    other = Store(tmp_path / "other")
    with pytest.raises(
        ArtifactError, match=r"part-00000.parquet has other content than was signed; delete artifacts/prompts/"
    ):
        mirror.fetch(other, "prompts", record.key)
    assert other.load("prompts", record.key) is None


def test_only_what_lies_in_the_mirror_is_evicted_oldest_first(store, address, make_prompts):
    mirror = Mirror(address)
    records = [artifact(store, make_prompts, count) for count in (2, 3, 4)]
    for age, record in enumerate(records):
        os.utime(store.directory("prompts", record.key) / RECORD, (1000 + age, 1000 + age))
    for record in records[1:]:
        mirror.push(store, record)
    keep = sum(file.size for record in (records[0], records[2]) for file in record.files)
    assert evict(store, mirror, keep) == [records[1]]
    assert [record.key for record in store.records("prompts")] == [records[0].key, records[2].key]
    assert evict(store, mirror, 0) == [records[2]]  # the first is nowhere else


def test_an_address_that_is_none_is_refused(capsys):
    with pytest.raises(ConfigError, match="is no address of an object store .*it looks like s3://bucket/prefix"):
        Mirror("bucket/prefix")
    assert main(["push", "nowhere"]) == 2
    assert "no address" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_worth_another_try_and_credentials_stay_out_of_messages():
    class Silent:
        def get_file_info(self, path):
            raise OSError("no route to host")

    mirror = Mirror("s3://user:secret@bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    mirror.files = Silent()
    with pytest.raises(
        TransientError, match=r"^s3://user:\*\*\*@bucket/x: could not read prompts 0000000000000000: no route to host$"
    ):
        mirror.load("prompts", "0" * 16)
