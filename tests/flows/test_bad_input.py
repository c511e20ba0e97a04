"""Wrong requests, as a user makes them: one clear sentence, exit code 2, before any model loads, and nothing written.

Strategy: the real command, a fresh process each, around the tiny model and small prompt files; one thing is wrong in each. What the message
must say is what the user needs to find the place.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def refuse(tmp_path, make_run):
    """refuse(message, sections={...}, settings=[...]) runs the command and checks how it was refused; returns what it said."""

    def check(*message: str, store: Path | None = None, config: Path | None = None, settings=(), **sections) -> str:
        store = store or tmp_path / "store"
        before = sorted(path for path in tmp_path.rglob("*"))
        command = [
            sys.executable,
            "-m",
            "flows",
            "run",
            str(config or make_run("bad", **sections)),
            "--store",
            str(store),
        ]
        command += [word for setting in settings for word in ("--set", setting)]
        environment = os.environ | {"HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 2, done.stdout + done.stderr
        for part in message:
            assert part in done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""
        assert (
            not store.is_dir()
            and sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before
        )
        return done.stderr

    return check


@pytest.fixture
def lines(tmp_path):
    """lines("{...}", {...}, ...) writes a prompt file: texts as they are, mappings as JSON."""

    def write(*rows, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def prompt(number: int, **changes) -> dict:
    return {"prompt_id": f"q{number}", "prompt": f"Tell {number} things about the number {number * 7}."} | changes


# --- settings


def test_an_unknown_key(refuse):
    said = refuse(
        "bad.yaml cannot be used because of 1 problem:\n  sampling.temprature: unknown key; did you mean temperature?\n",
        sampling={"temprature": 1},
    )
    assert said.startswith("ConfigError: ") and len(said.splitlines()) == 2


def test_a_wrong_type(refuse):
    refuse(
        "  training.learning_rate: Input should be a valid number, unable to parse string as a number (got 'fast')",
        training={"learning_rate": "fast"},
    )


def test_an_unknown_method_with_the_nearest_known_one(refuse):
    refuse("  method: unknown method 'sppoo'; known: ", "dpo", "Did you mean 'sppo'?", method={"name": "sppoo"})


@pytest.mark.parametrize("setting", ["iterations", "method={name: dpo"])
def test_an_override_with_bad_syntax(refuse, setting):
    said = refuse(repr(setting), settings=[setting])
    assert said.startswith("ConfigError: ")


def test_an_override_of_an_unknown_key(refuse):
    refuse("  training.learning_rat: unknown key; did you mean learning_rate?", settings=["training.learning_rat=1e-5"])


def test_a_run_config_that_is_not_there(refuse, tmp_path):
    refuse(f"cannot read the run config {tmp_path}/none.yaml: No such file or directory", config=tmp_path / "none.yaml")


def test_a_run_config_that_is_no_yaml(refuse, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: [")
    refuse("bad.yaml is not valid YAML", config=tmp_path / "bad.yaml")


# --- the model


def test_a_model_directory_that_is_not_there(refuse):
    refuse("the model directory /no/such/model does not exist", policy={"path": "/no/such/model"})


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("chat_template.jinja", "has no chat template"),
        ("tokenizer.json", "has no tokenizer file"),
        ("model.safetensors", "has no *.safetensors weights"),
    ],
)
def test_a_model_without_a_part_of_it(refuse, tmp_path, tiny_model, missing, message):
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (copy / missing).unlink()
    refuse(str(copy), message, policy={"path": str(copy)})


# --- the prompts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train.jsonl is empty"),
        ([prompt(1), '{"prompt": "x"'], "train.jsonl line 2 is not valid JSON: Expecting ',' delimiter at column 15"),
        (
            [prompt(1), prompt(2), prompt(3, prompt_id="q1")],
            "train.jsonl line 3: the prompt_id 'q1' was already used in line 1",
        ),
        ([prompt(1), '{"promt": "x"}'], "train.jsonl line 2: no column holds a prompt (promt: 'x')"),
        ([prompt(1), prompt(2)], "train.jsonl has 2 prompts; 2 iterations of 12 need 24"),
    ],
    ids=["empty", "malformed", "duplicate", "unknown field", "too few"],
)
def test_a_prompt_file_that_is_wrong(refuse, lines, rows, message):
    refuse(message, prompts={"train": lines(*rows)})


def test_a_prompt_file_that_is_not_there(refuse):
    refuse(
        "cannot read the prompt file /no/prompts.jsonl: No such file or directory",
        prompts={"heldout": "/no/prompts.jsonl"},
    )


def test_a_heldout_prompt_in_the_training_set(refuse, lines):
    train, heldout = lines(*map(prompt, range(30))), lines(prompt(5, prompt_id="other"), name="heldout.jsonl")
    refuse(
        "1 held-out prompt(s) are (nearly) in the training set",
        "'other' and 'q5' (similarity 1.00",
        prompts={"train": train, "heldout": heldout},
    )


def test_a_prompt_with_a_check_that_nobody_knows(refuse, lines):
    train = lines(*[prompt(number, checks=[{"name": "max_wordz", "value": 3}]) for number in range(30)])
    refuse(
        "scoring.scorer: the prompt 'q0'", "max_wordz", prompts={"train": train}, scoring={"scorer": {"name": "checks"}}
    )


def test_a_prompt_without_the_truth_that_the_method_trains_on(refuse, lines):
    refuse(
        "none of the 30 prompts of",
        "has a `response`: give other prompts",
        prompts={"train": lines(*map(prompt, range(30)))},
        method={"name": "spin"},
    )


def test_a_prompt_longer_than_the_limit(refuse, lines):
    train = lines(*map(prompt, range(29)), prompt(29, prompt="word " * 70))
    refuse(
        "the prompt 'q29' has",
        "tokens, allowed are 1 to 64 (sampling.max_prompt_tokens; the model's context is 256)",
        prompts={"train": train},
    )


def test_limits_longer_than_the_context(refuse):
    refuse(
        "max_prompt_tokens + max_new_tokens = 264 exceeds the context of 256 positions",
        sampling={"max_new_tokens": 200},
    )


# --- the machine


def test_a_store_that_is_a_file(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(
        f"the store {tmp_path}/file/store cannot be made: {tmp_path}/file is a file", store=tmp_path / "file" / "store"
    )


def test_a_store_that_cannot_be_written(refuse):
    refuse("the store /proc/store is not writable", "Set SELFPLAY_STORE (or --store)", store=Path("/proc/store"))


def test_an_interpreter_that_is_not_there(refuse):
    refuse("sampling.runtime.python = '/no/python' cannot be run", sampling={"runtime": {"python": "/no/python"}})


def test_an_lm_eval_task_that_is_not_there(refuse):
    refuse("cannot read the lm-eval task /no/task/task.yaml", evaluation={"lm_eval": [{"path": "/no/task"}]})


# --- where the work runs


def test_a_profile_that_nobody_knows(refuse):
    refuse(
        "execution.profile",
        "no engine is called 'mesos'; there are local, process-pool, kubernetes, ray, slurm",
        execution={"profile": "mesos"},
    )


def test_workers_of_a_server_that_nobody_named(refuse):
    refuse(
        "execution.profile is process-pool, and no Prefect server is named: export PREFECT_API_URL",
        execution={"profile": "process-pool"},
    )


def test_more_gpus_than_any_node_has(refuse):
    refuse(
        "train: one worker asks for 4 GPUs on a node, and no node has more than 2 (execution.gpus_per_node): lower execution.gpus.train",
        execution={"profile": "slurm", "gpus_per_node": 2},
        training={"runtime": {"num_processes": 4}},
    )
