"""Every name trains: each method, each weight provider and each preset's CPU twin goes through the whole loop with models of 0.1 M parameters.

Strategy: all runs are played once, in one process on one store (in_process.py), and each test reads its own result. At the first step
policy and reference are one model, so the first loss is a constant that the paper gives: log 2 for everything of the form -log sigmoid(h).
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_contracts.artifact import parse_record
from flows.config import load_run
from stages.methods import METHODS
from stages.running.history import events
from stages.weighting.weights import WEIGHTS
from tests.stages.methods.outside_package import write_package

ROOT = Path(__file__).resolve().parents[2]
TWINS = sorted(
    path.stem
    for path in (ROOT / "deploy" / "runs" / "tiny").glob("*.yaml")
    if path.stem not in ("base", "teacher", "auxiliary")
)
SINCE_THE_FOUR_PAPERS = ("comal", "gkd", "inpo", "iw_opd", "mnpo", "opd", "swift-kd-gpt2-1.5b", "tidpo_v3")
LOG_2 = ("d2po", "dpo", "kto_pair", "spin", "spin_lengthnorm", "swift", "swift_released", "tdpo", "tgdpo", "tis_dpo")
CONSTANTS = {name: math.log(2) for name in LOG_2} | {
    "kto_pair": 1.0,
    "kto": 0.5,
    "tidpo": math.log(2) + 0.1 * 0.5,
    "ipo": 25.0,
    "inpo": (1 / (2 * 0.0075)) ** 2,
    "mnpo": (1 / (2 * 0.0075)) ** 2,
}
EXTRA = {
    "sppo-all": {"method": {"name": "sppo", "eta": 1, "keep": "all", "log_z": True}, "scoring.pairing": "each"},
    "swift-tdpo-kl": {"method": {"name": "swift", "weight_mode": "divide", "kl_mode": "tdpo"}},
    "tidpo-given": {"method": {"name": "tidpo", "importance": "given"}, "weighting.weights": {"name": "tidpo"}},
    "seqkd-teacher": {"method": {"name": "seqkd"}, "prompts.answers_from_teacher": True},
    "swift-template": {
        "method": {"name": "swift"},
        "weighting.weights": {"name": "swift", "teacher_prompt": "chat_template"},
    },
}


def small_settings(work: Path, policy: Path) -> dict:
    """What every case sets: the tiny model, four held-out prompts, exact arithmetic."""
    heldout = work / "heldout.jsonl"
    heldout.write_text(
        "".join(line + "\n" for line in (ROOT / "deploy/prompts/quickstart_heldout.jsonl").read_text().splitlines()[:4])
    )
    small = {
        "policy.path": str(policy),
        "prompts.heldout": str(heldout),
        "training.dtype": "float32",
        "training.learning_rate": 1e-4,
    }
    return small | {"sampling.backend.dtype": "float32", "sampling.max_prompt_tokens": 200, "learning_rates": []}


def twin_case(name: str, small: dict, same: Path, teacher: Path) -> dict:
    """A preset's CPU twin; `same`: a model of the policy's tokenizer, `teacher`: of another one."""
    settings = dict(small)
    text = (ROOT / "deploy" / "runs" / "tiny" / f"{name}.yaml").read_text()
    # GKD compares logits: its teacher must share the vocabulary.
    teacher_path = str(same if name == "gkd" else teacher)
    settings |= {"models.teacher.path": teacher_path} if "teacher.yaml" in text else {}
    if "rouge_l" in text:  # measured by responses, which the small held-out prompts do not have
        del settings["prompts.heldout"]
    settings |= {"auxiliary.dtype": "float32"} if "auxiliary.yaml" in text else {}
    return {"id": f"twin {name}", "config": f"deploy/runs/tiny/{name}.yaml", "set": settings}


@pytest.fixture(scope="session")
def played(tmp_path_factory, make_model, tiny_model, tools):
    """id -> result of every run."""
    work = tmp_path_factory.mktemp("methods")
    same, teacher = make_model(work / "same_tokens", seed=1), make_model(work / "teacher", seed=2, vocabulary=300)
    small = small_settings(work, tiny_model)
    base = small | {
        "iterations": 1,
        "scoring.scorer": {"name": "length", "target_tokens": 6},
        "sampling.num_candidates": 4,
    }
    base |= {"models.teacher": {"path": str(teacher)}} | {
        f"models.{role}": {"path": str(same)} for role in ("positive", "negative", "reward_model")
    }
    plain = "deploy/runs/tiny/spin.yaml"
    cases = [
        {"id": f"method {name}", "config": plain, "set": base | {"method": {"name": name}, "mix_previous": False}}
        for name in METHODS.names()
    ]
    cases += [
        {"id": "outside method", "config": plain, "set": base | {"method": "slack", "mix_previous": False}},
        {
            "id": "fixed reference",
            "config": plain,
            "set": base | {"method": {"name": "dpo"}, "mix_previous": False, "reference": {"path": str(same)}},
        },
        {"id": "outside weights", "config": plain, "set": base | {"weighting.weights": "first_tokens"}},
    ]
    for case in cases:
        if case["id"] == "method kd":  # its teacher must share the vocabulary
            case["set"] |= {"models.teacher": {"path": str(same)}}
    cases += [
        {
            "id": f"weights {name}",
            "config": plain,
            "set": base | {"method": {"name": "swift"}, "weighting.weights": {"name": name}},
        }
        for name in WEIGHTS.names()
    ]
    warm = base | {"method": {"name": "swift"}, "warm_start": {"learning_rate": 1e-2, "batch_size": 4, "epochs": 2}}
    lora = {"training.adapter": {"name": "lora", "rank": 2, "save_merged": False}, "method": {"name": "tdpo"}}
    cases += [{"id": "warm start", "config": plain, "set": warm}]
    cases += [{"id": "warm start of an adapter", "config": plain, "set": warm | lora | {"iterations": 2}}]
    cases += [{"id": f"extra {name}", "config": plain, "set": base | settings} for name, settings in EXTRA.items()]
    for name in TWINS:
        cases.append(twin_case(name, small, same, teacher))
        if name == "swift":  # on a store of its own, where no other run has paid for anything
            cases.append(cases[-1] | {"id": "swift alone", "store": str(work / "alone")})
    return tools.play_cases(cases, work, write_package(work / "site"), timeout=1100)


def result_of(played, name):
    result = played[name]
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_trains_from_its_constant(played, name):
    metrics = result_of(played, f"method {name}")["iterations"][0]["train"]
    assert math.isfinite(metrics["loss"]) and metrics["steps"] > 0
    if name in CONSTANTS:
        assert metrics["first_loss"] == pytest.approx(CONSTANTS[name], abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTS.names())
def test_every_weight_provider_fills_the_rows(played, name):
    (iteration,) = result_of(played, f"weights {name}")["iterations"]
    weigh = iteration["weigh"]
    assert weigh["weights/chosen/min"] <= weigh["weights/chosen/mean"] <= weigh["weights/chosen/max"]
    assert iteration["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    if name == "swift":
        assert (
            weigh["weights/chosen/min"] >= math.exp(-0.5) - 1e-4 and weigh["weights/chosen/max"] <= math.exp(1.5) + 1e-4
        )


def test_a_method_of_another_package_trains_and_a_provider_of_another_package_weighs(played):
    """Both are the code blocks of stages/methods/README.md."""
    (iteration,) = result_of(played, "outside method")["iterations"]
    assert iteration["train"]["first_loss"] == pytest.approx(1.0, abs=1e-4)  # max(0, 1 - h) at policy = reference
    (iteration,) = result_of(played, "outside weights")["iterations"]
    assert (iteration["weigh"]["weights/chosen/min"], iteration["weigh"]["weights/chosen/max"]) == (0.0, 1.0)


def test_a_fixed_model_may_be_the_reference(played):
    (iteration,) = result_of(played, "fixed reference")["iterations"]
    assert math.isfinite(iteration["train"]["first_loss"])
    assert iteration["train"]["first_loss"] != pytest.approx(math.log(2), abs=1e-3), "policy and reference differ"


@pytest.mark.parametrize("name", ["warm start", "warm start of an adapter"])
def test_a_warm_start_learns_the_responses_and_self_play_begins_at_its_constant(played, name):
    result = result_of(played, name)
    warm_start = result["warm_start"]
    assert (warm_start["train"]["rows_trained"], warm_start["train"]["steps"]) == (16, 8) and warm_start["score"][
        "pairs"
    ] == 16
    assert warm_start["train"]["loss"] < warm_start["train"]["first_loss"]
    assert result["iterations"][0]["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("name", EXTRA)
def test_variants_train_too(played, name):
    assert math.isfinite(result_of(played, f"extra {name}")["iterations"][0]["train"]["loss"])


@pytest.mark.parametrize("name", TWINS)
def test_the_cpu_twin_of_every_preset_plays_two_iterations(played, name):
    iterations = result_of(played, f"twin {name}")["iterations"]
    assert len(iterations) == 2
    for iteration in iterations:
        assert math.isfinite(iteration["train"]["loss"])


def steps_of_unfinished(store: Path, finished: int) -> int:
    """Steps of the training that comes after so many finished ones; 0 if it has not begun."""
    directories = list((store / "artifacts" / "checkpoint").glob("*"))
    unfinished = [path for path in directories if not (path / "record.json").is_file()]
    if len(directories) - len(unfinished) < finished or not unfinished:
        return 0
    return sum(event["event"] == "step" for event in events(unfinished[0]))


def kill_in_training(request: Path, store: Path, finished: int) -> None:
    """Play a request and SIGKILL it in its last training, which comes after so many finished ones."""
    command = [sys.executable, str(ROOT / "tests/flows/in_process.py"), str(request), str(request.with_name("killed"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with request.with_name("killed.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while not steps_of_unfinished(store, finished):
        assert process.poll() is None, "it was over before it was killed: see killed.log"
        time.sleep(0.001)
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", SINCE_THE_FOUR_PAPERS)
def test_a_method_goes_on_after_a_kill_in_its_last_training(name, tmp_path, make_model, tiny_model, tools):
    """Compared with a store of its own: in one that holds other runs' log-probs, bits differ."""
    same, teacher = make_model(tmp_path / "same", seed=1), make_model(tmp_path / "teacher", seed=2, vocabulary=300)
    case = twin_case(name, small_settings(tmp_path, tiny_model), same, teacher)
    case["set"] |= {"training.runtime.save_every_steps": 1}
    request, store = tmp_path / "request.json", tmp_path / "store"
    request.write_text(json.dumps({"store": str(store), "cases": [case]}))
    warm_start = load_run(ROOT / case["config"]).warm_start
    kill_in_training(request, store, finished=1 if warm_start is None else 2)
    final = Path(result_of(tools.play_cases([case], tmp_path), case["id"])["final"])
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Path(result_of(tools.play_cases([case], tmp_path / "undisturbed"), case["id"])["final"])
    assert final.name == undisturbed.name, "the same key"
    assert (final / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert parse_record((final / "record.json").read_bytes(), name).provenance["starts"] == 2


def test_a_teachers_pass_over_ground_truths_is_paid_once(played):
    first, second = (iteration["weigh"] for iteration in result_of(played, "swift alone")["iterations"])
    # 16 ground truths and 16 generations: from the second iteration on only the new generations are paid.
    assert (first["logps/teacher/misses"], second["logps/teacher/hits"], second["logps/teacher/misses"]) == (32, 16, 16)
    # The weights' policy pass is the reference pass of the same iteration.
    assert second["logps/reference/misses"] == 0


def test_contrastive_models_are_trained_by_the_run_itself(played):
    iteration = result_of(played, "twin tis_dpo_d")["iterations"][0]
    for role in ("positive", "negative"):
        assert iteration[role]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_every_preset_has_a_twin_and_is_valid():
    presets = {path.stem for path in (ROOT / "deploy" / "runs").glob("*.yaml")} - {"quickstart"}
    sizes = {
        name for name in presets if "-" in name
    }  # swift-qwen1.5-1.8b, ...: a paper's sizes; they extend a preset and share its twin
    assert presets - sizes == {name for name in TWINS if "-" not in name} and set(TWINS) <= presets
    assert all("\nextends: " in (ROOT / "deploy" / "runs" / f"{name}.yaml").read_text() for name in sizes)
    for name in presets:
        load_run(ROOT / "deploy" / "runs" / f"{name}.yaml")
