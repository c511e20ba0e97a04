"""Faults of the machine around a build: the disk is full or read-only, a judge comes and goes, the hub is away."""

import fcntl
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

from data_contracts.gc import gc
from data_contracts.store import Store
from flows.cli.doctor import doctor
from tests.faults.harness import RUNTIME, Command, contents, judge

ROOT = Path(__file__).resolve().parents[2]


def run(scene, store, work, **environment):
    command = Command(scene.steps, store, work, **environment)
    return command.end()


def test_a_full_disk_stops_the_build_in_a_sentence_and_a_larger_one_finishes_it(scenes, small_disk, tmp_path):
    scene = scenes["weigh"]
    disk = small_disk(20_000)
    shutil.copytree(scene.before, disk / "store", symlinks=True)
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"x" * (free - 12_288))  # three blocks are left
    ended = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="0")
    assert ended.code in (4, 5) and "No space left on device" in ended.out, ended.out
    assert "Free some space (`selfplay gc" in ended.out
    assert not (disk / "store" / "artifacts" / scene.directory / "record.json").exists()
    (disk / "filler").unlink()
    again = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="0")
    assert judge(scene, disk / "store", again) == [], again.out


def test_a_nearly_full_disk_or_a_spent_budget_stops_before_anything_is_started(scenes, small_disk, tmp_path):
    scene = scenes["score"]
    disk = small_disk(20_000)
    shutil.copytree(scene.before, disk / "store", symlinks=True)
    ended = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="30M")
    assert ended.code == 4 and "less than 30 MiB (SELFPLAY_STORE_MIN_FREE_BYTES)" in ended.out, ended.out
    ended = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="0", SELFPLAY_STORE_MAX_BYTES="10K")
    assert ended.code == 4 and "its budget SELFPLAY_STORE_MAX_BYTES is 10 KiB" in ended.out, ended.out
    assert not (disk / "store" / "artifacts" / scene.directory / "stage.log").exists()
    ended = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="1M", SELFPLAY_STORE_MAX_BYTES="1G")
    assert judge(scene, disk / "store", ended) == [], ended.out


def test_a_read_only_store_can_be_asked(scenes, small_disk):
    """doctor, status of locks and gc --dry-run look at a store that may only be read; who builds there is still said."""
    scene = scenes["score"]
    disk = small_disk(20_000)
    store = Store(shutil.copytree(scene.before, disk / "store", symlinks=True))
    kind, key = store.artifact_names()[0]
    with store.lock(kind, key):
        pass
    small_disk.remount("ro")
    with open(store.lock_path(kind, key)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with store.try_lock(kind, key) as owner:
            assert owner is not None and owner.pid == os.getpid()
    with store.try_lock(kind, key) as owner, store.try_lock("checkpoint", "none") as nobody:
        assert owner is None and nobody is None
    assert [finding.message for finding in doctor(store) if "not writable" in finding.message]
    assert gc(store, 0, dry_run=True, young_seconds=-1)
    small_disk.remount("rw")


def test_a_read_only_store_is_said_in_a_sentence_and_what_is_built_is_still_found(scenes, small_disk, tmp_path):
    scene = scenes["score"]
    disk = small_disk(20_000)
    shutil.copytree(scene.before, disk / "store", symlinks=True)
    small_disk.remount("ro")
    ended = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="0")
    assert ended.code == 4 and "Read-only file system" in ended.out and "Mount it writable" in ended.out, ended.out
    assert "Traceback" not in ended.out
    small_disk.remount("rw")
    again = run(scene, disk / "store", tmp_path, SELFPLAY_STORE_MIN_FREE_BYTES="0")
    assert judge(scene, disk / "store", again) == [], again.out


class Moody(http.server.BaseHTTPRequestHandler):
    """A judge that is overloaded, hangs up, or talks nonsense two times in three."""

    mood = random.Random(0)
    moody = True
    answered: ClassVar[list[str]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        mood = (
            self.mood.choice(["503", "429", "hang up", "half", "html", "fine", "fine", "fine"])
            if self.moody
            else "fine"
        )
        if mood == "hang up":
            self.connection.close()
            return
        text = json.dumps({"choices": [{"message": {"content": f"Score: {len(body) % 5}"}}]}).encode()
        self.send_response(int(mood) if mood.isdigit() else 200)
        if mood == "429":
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(
            text[: len(text) // 2] if mood == "half" else b"<html>"[:6].ljust(len(text)) if mood == "html" else text
        )
        if mood == "half":
            self.connection.close()
        if mood == "fine":
            self.answered.append(body.decode())

    def log_message(self, *_):
        pass


def test_a_judge_that_comes_and_goes_gives_the_scores_of_one_that_stays(scenes, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    runtime = {
        "base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "retries": 12,
        "backoff_seconds": 0.01,
        "timeout_seconds": 5,
    }
    config = {
        "scorer": {"name": "llm_judge", "model": "m", "runtime": runtime},
        "runtime": {"prompts_per_shard": 2, **RUNTIME},
    }
    steps = [list(step) for step in scenes["score"].steps]
    steps[-1][2] = config
    found = []
    try:
        for moody in (True, False):
            Moody.moody, store = moody, tmp_path / f"moody-{moody}"
            Moody.answered.clear()
            shutil.copytree(scenes["score"].before, store, symlinks=True)
            ended = Command(steps, store, tmp_path).end()
            assert ended.code == 0, ended.out
            assert len(Moody.answered) == len(set(Moody.answered)), "a question that was answered was asked again"
            (record,) = Store(store).records("scored_pairs")
            assert record.metrics["unscored"] == 0
            found.append(contents(ended.out)["score"])
    finally:
        server.shutdown()
        server.server_close()
    assert found[0] == found[1]


def test_a_hub_that_cannot_be_reached_is_worth_another_try_and_says_so(tmp_path):
    code = (
        "from tasks.models import locate\nfrom data_contracts.checkpoint import ModelRef\nfrom data_contracts.errors import TransientError\n"
        "try:\n    locate(ModelRef(hub_id='nobody/nothing', revision='main'), True)\nexcept TransientError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "the model nobody/nothing could not be fetched and is not in the local cache" in done.stdout, done.stderr
    assert "Give `path:` of a directory instead" in done.stdout
