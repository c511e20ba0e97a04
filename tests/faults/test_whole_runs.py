"""Whole runs with their Prefect server and MLflow, struck from outside; and the doctor in front of a real zombie. Minutes each: marked slow."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.faults import whole
from tests.faults.deployed import free_port, wait_for
from tests.faults.harness import Fault

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_model, make_rows):
    return whole.prepare(tmp_path_factory.mktemp("whole") / "root", tiny_model, make_rows(6), make_rows(3, first=100))


@pytest.mark.parametrize("kind", [*whole.KINDS, *whole.DEPLOYED])
def test_a_run_survives(scene, tmp_path, kind):
    verdict = whole.strike(scene, Fault(whole.WHOLE, kind, 1), tmp_path / "work")
    assert verdict.problems == [], verdict.how
    assert verdict.outcome in ("resumed", "unaffected")


def test_a_run_listens_on_this_machine_only_and_the_doctor_finds_it_dead(tiny_model, make_rows, tmp_path):
    """A server of its own outlives the run; the run is killed; Prefect still calls it Running."""
    port, config = free_port(), whole.write_config(tmp_path, tiny_model, make_rows(6), make_rows(3, first=100))
    environment = os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "FAULT_MARK": "doctor",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    api = f"http://127.0.0.1:{port}/api"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{api}/health", timeout=5).status == 200, 180)
        play = whole.Play(config, tmp_path / "store", tmp_path, PREFECT_API_URL=api)
        assert play.wait_for(lambda: whole._in_a_stage(play)), play.log.read_text()
        for pid in [server.pid, *play.tree()]:
            for one in psutil.Process(pid).net_connections():
                assert one.status != psutil.CONN_LISTEN or one.laddr.ip in ("127.0.0.1", "::1"), one
        play.process.send_signal(signal.SIGKILL)
        play.end()
        assert play.remains() == []
        time.sleep(1)
        command = [sys.executable, "-m", "flows.cli.doctor", "--store", str(tmp_path / "store"), "--api", api]
        calm = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "is Running for Prefect" not in calm.stdout  # too early to tell
        environment = os.environ | {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "1"}
        time.sleep(4)
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert said.returncode == 1 and "is Running for Prefect, and it has been silent for" in said.stdout, (
            said.stdout + said.stderr
        )
        assert "prefect flow-run delete" in said.stdout and "interrupted build" in said.stdout
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
            process.kill()
        server.wait()
