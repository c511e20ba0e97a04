"""benchmarks.gpu_check survives parts that fail, and says which goals are met. (Its measurements: test_benchmarks.py.)"""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks._gpu_models import KINDS, model_flops, shape_of_kind


def test_a_part_that_crashes_or_hangs_says_so(tmp_path):
    log = tmp_path / "part.log"
    failing = [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"]
    assert gpu_check.run_parts(failing, 60, log) == "exit code 3: out of memory"
    assert gpu_check.run_parts([sys.executable, "-c", ""], 60, log) is None
    hanging = "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    began = time.monotonic()
    assert gpu_check.run_parts([sys.executable, "-c", hanging], 2, log) == "ended after 2 s"
    assert time.monotonic() - began < 30
    child = int(log.read_text())
    for _ in range(100):  # its children end with it; init may not have collected them yet
        stat = Path(f"/proc/{child}/stat")
        if not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a child of the part lives on")


def test_the_other_parts_go_on_and_the_time_is_kept(tmp_path, monkeypatch):
    def run_parts(command, seconds, log):
        name = command[command.index("--inside") + 1]
        if name == "weights":
            return "exit code -9: killed"
        (tmp_path / f"{name}.json").write_text(json.dumps({"pairs_per_second": 2.5}))
        return None

    monkeypatch.setattr(gpu_check, "run_parts", run_parts)
    options = argparse.Namespace(smoke=False, seconds=59, json=tmp_path / "check.json")
    monkeypatch.setitem(gpu_check.LIMITS, "weights", gpu_check.Limit(10, 1))
    results = gpu_check.measure(["machine", "weights", "train_135m", "sample"], options, tmp_path)
    assert results["weights"] == {"error": "exit code -9: killed"}
    assert results["train_135m"] == {"pairs_per_second": 2.5}
    assert results["sample"]["error"].startswith("left out: 5")
    assert json.loads(options.json.read_text()) == results
    assert "| weights | error | exit code -9: killed |  |" in gpu_check.table(results)


def test_goals_and_the_hours_of_an_iteration():
    results = {
        "train_1.8b": {"mfu": 0.5, "losses": [0.7]},
        "weights": {"first_hours_of_50000": 0.3},
        "sample": {"hours_of_50000": 0.05},
        "train_swift": {"pairs_per_second": 50.0},
    }
    shown = gpu_check.table(results)
    assert "| train_1.8b | mfu | 0.5 | >= 0.45: met |" in shown and "losses" not in shown
    assert "| weights | first_hours_of_50000 | 0.3 | <= 0.21: missed |" in shown
    hours = gpu_check.iteration_of(results)
    assert hours["train_hours"] == pytest.approx(100_000 / 50 / 3600)
    assert hours["hours"] == pytest.approx(0.05 + 0.3 + hours["train_hours"])
    assert gpu_check.iteration_of(results | {"sample": {"error": "no vllm"}}) == {}


def test_the_shapes_are_those_of_the_published_models():
    parameters = {name: shape_of_kind(kind).parameters for name, kind in KINDS.items()}
    assert parameters == pytest.approx({"135m": 134.5e6, "1.8b": 1.837e9, "7b": 7.242e9}, rel=1e-3)


def test_flops_of_a_pass_by_hand():
    shape = shape_of_kind(KINDS["135m"])
    layers = 30 * (2 * 576 * (576 + 192) + 3 * 576 * 1536)
    forward = model_flops(shape, 100, 40, [60, 60], 1)
    assert forward == 2 * 100 * layers + 2 * 40 * 576 * 49_152 + 30 * 2 * 2 * 60**2 * 576
    assert model_flops(shape, 100, 40, [60, 60], 3) == 3 * forward
