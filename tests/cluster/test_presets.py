"""Presets at the papers' sizes can be read and fit the hardware they name; every deployment names an existing file."""

from pathlib import Path

import pytest
import yaml

from flows.config import load_run
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


def test_the_small_preset_would_not_fit_without_its_settings():
    name = ROOT / "deploy" / "runs" / "swift-qwen1.5-1.8b-2x24.yaml"
    bare = {"training.runtime.offload_optimizer": False, "training.runtime.zero_stage": 0}
    assert [line.need.stage for line in plan(load_run(name, bare)) if line.problem] == ["train"]


def test_every_deployment_names_a_run_and_a_flow_that_exist():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    for deployment in deployments:
        file, _, function = deployment["entrypoint"].partition(":")
        assert f"def {function}(" in (ROOT / file).read_text()
        if config := deployment.get("parameters", {}).get("config"):
            load_run(ROOT / config)
    assert {deployment["name"] for deployment in deployments} >= set(PRESETS)
