"""Data in the shapes that people have trains: `selfplay init METHOD --data PATH --policy MODEL` writes a config that runs.

Strategy: the configs are played once, in one process (in_process.py), on a model of 0.1 M parameters; what each record says is read per test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_contracts.errors import ConfigError
from flows.cli.scaffold import commented_config
from flows.config import load_run

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "sft": "alpaca.json",
    "dpo": "trl_conversational_pairs.parquet",
    "kto": "kto_unpaired.jsonl",
    "spin": "spin_iteration.jsonl",
    "swift": "ultrachat_messages.jsonl",
    "sppo": "prompts.csv",
    "kto of pairs": "ultrafeedback_binarized.parquet",
    "dpo of labels": "kto_unpaired.jsonl",
    "sft of pairs": "trl_pairs.jsonl",
    "dpo of everybody's": "messy.jsonl",
}


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model, shared):
    """id -> result of every run."""
    work = tmp_path_factory.mktemp("own")
    quick = {"sampling.backend": {"name": "transformers", "dtype": "float32"}, "training.dtype": "float32"}
    quick |= {"sampling.max_new_tokens": 16, "training.learning_rate": 1e-4}
    cases = []
    for name, file in CASES.items():
        method = name.split()[0]
        data = shared / "data" / "as_people_have_it" / file
        config = work / f"{name.replace(' ', '_')}.yaml"
        config.write_text(commented_config(method, str(data), str(tiny_model), work))
        changes = {"scoring.scorer": {"name": "length"}} if method == "sppo" else {}
        cases.append({"id": name, "config": str(config), "set": quick | changes})
    (work / "request.json").write_text(json.dumps({"store": str(work / "store"), "cases": cases}))
    script = Path(__file__).with_name("in_process.py")
    command = [sys.executable, str(script), str(work / "request.json"), str(work / "out.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    results = {line["id"]: line for line in map(json.loads, (work / "out.jsonl").read_text().splitlines())}
    assert len(results) == len(cases), done.stderr[-3000:]
    return results


@pytest.mark.parametrize("name", CASES)
def test_it_trains(played, name):
    assert "error" not in played[name], played[name]["error"]
    train = played[name]["iterations"][0]["train"]
    assert train["steps"] > 0 and train["first_loss"] > 0


def test_kto_takes_pairs_apart_into_a_good_and_a_bad_answer(played):
    score = played["kto of pairs"]["iterations"][0]["score"]
    assert (score["pairs"], score["win_rate/chosen"]) == (10, 0.5)  # five pairs; one prompt is held out


def test_kto_reads_single_answers_with_their_labels(played):
    score = played["kto"]["iterations"][0]["score"]
    assert (score["pairs"], score["win_rate/chosen"]) in ((9, pytest.approx(5 / 9)), (10, 0.5))


def test_labels_become_pairs_for_methods_of_pairs(played):
    assert played["dpo of labels"]["iterations"][0]["score"]["pairs"] in (4, 5)


def test_everybodys_file_trains_on_the_pairs_that_are_whole(played):
    # Of seven pairs that can be read one is too long for the tiny model, and one or two of the six prompts are held out.
    assert played["dpo of everybody's"]["iterations"][0]["score"]["pairs"] in (4, 5)


def test_a_file_in_another_place_is_written_relative_to_the_config(tmp_path, tiny_model, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "configs").mkdir()
    rows = [{"prompt": f"Say {number}.", "response": str(number)} for number in range(30)]
    (tmp_path / "data" / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "configs" / "run.yaml"
    path.write_text(commented_config("sft", "data/mine.jsonl", str(tiny_model), Path("configs")))
    assert yaml.safe_load(path.read_text())["prompts"]["train"] == "../data/mine.jsonl"
    monkeypatch.chdir("/")
    assert load_run(path).prompts.train.path == str(tmp_path / "configs" / "../data/mine.jsonl")


@pytest.mark.parametrize(
    ("method", "rows", "message"),
    [
        ("spin", [{"prompt": "a"}], "spin trains on a `response`, and the data has none"),
        ("sft", [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
         "sft trains on a `response`, and the data has pairs without a prompt column"),
    ],
)  # fmt: skip
def test_data_that_a_method_cannot_train_on_is_refused(tmp_path, method, rows, message):
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match=message):
        commented_config(method, str(tmp_path / "mine.jsonl"), None, tmp_path)
