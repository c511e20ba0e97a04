"""Presets at the papers' sizes can be read and fit the hardware they name; every deployment names an existing file."""

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.dealing import share_of
from flows.config import load_run
from flows.forecast.memory import GIB
from flows.forecast.plan import plan, refuse_what_cannot_fit

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "deploy" / "runs").glob("*-*.yaml"))


def test_the_papers_sizes_are_there():
    assert {"swift-qwen1.5-1.8b", "swift-qwen1.5-1.8b-2x24", "sppo-mistral-7b", "sppo-llama-3-8b"} <= set(PRESETS)
    assert {"tgdpo-llama-3-8b", "tidpo-llama-3.2-3b", "swift-kd-gpt2-1.5b"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_the_hardware_it_names(name):
    run = load_run(ROOT / "deploy" / "runs" / f"{name}.yaml")
    assert run.execution.gpus_per_node and run.execution.gpu_memory_gib
    lines = refuse_what_cannot_fit(run)
    assert {line.need.stage for line in lines} >= {"sample", "weigh", "train", "evaluate"}
    assert all(
        line.need.workers * line.need.gpus <= run.execution.gpus_per_node for line in lines
    )  # all at once, on one node


def test_the_small_preset_fits_without_host_memory_and_not_without_its_settings():
    name = ROOT / "deploy" / "runs" / "swift-qwen1.5-1.8b-2x24.yaml"
    (train,) = [line.need for line in plan(load_run(name)) if line.need.stage == "train"]
    assert not any(train.host.values())  # no optimizer state waits in host memory
    assert train.device_bytes < 0.9 * 24 * GIB  # a plan that fits by less than a tenth has to be tried
    for bare in ({"zero_stage": 0}, {"gradient_checkpointing": False}):
        overrides = {f"training.runtime.{setting}": value for setting, value in bare.items()}
        assert [line.need.stage for line in plan(load_run(name, overrides)) if line.problem] == ["train"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_ranks_of_a_preset_wait_for_each_other_a_twentieth_of_the_time_at_most(name):
    share = share_of(name, load_run(ROOT / "deploy" / "runs" / f"{name}.yaml"), steps=20)
    if share.batch == share.ranks:  # SWIFT: one pair on each, and the longer one decides
        assert share.useful == pytest.approx(share.at_best) and share.useful > 0.8
    else:
        assert share.useful > (0.95 if share.packed else 0.92)  # padded rows fall into whole rectangles


def test_every_deployment_names_a_run_and_a_flow_that_exist():
    runs = {re.sub(r"\W", "_", path.stem): path for path in (ROOT / "deploy" / "runs").glob("*.yaml")}
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    work = yaml.safe_load((ROOT / "deploy" / "prefect" / "work.yaml").read_text())["deployments"]
    for deployment in (*deployments, *work):
        file, _, function = deployment["entrypoint"].partition(":")
        if file == "flows/presets.py" and function != "own":
            load_run(runs[function])
        elif file != "flows/presets.py":
            assert f"def {function}(" in (ROOT / file).read_text()
    assert {deployment["name"] for deployment in deployments} >= set(PRESETS)
