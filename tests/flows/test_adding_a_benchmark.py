"""README: "I want to add a benchmark", followed to the letter; and what of it is part of the evaluate stage's key.

Strategy: the row of README's table is read, a directory is written as it says, and the run's own preflight and evaluate
stage read it. The tiny model answers, so only the report's row is checked, not what the number is worth.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_contracts.artifact import ArtifactRef
from data_contracts.shards import read_shards
from data_contracts.store import Store
from flows.config import load_run
from flows.preflight import gather
from stages.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]
TASK = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
QUESTIONS = [
    {"question": f"What is the capital of {country}?", "choices": ["Paris", "Rome", "Lima"], "answer": answer}
    for answer, country in enumerate(("France", "Italy", "Peru"))
]


@pytest.fixture
def benchmark(tmp_path):
    """A directory with lm-eval's task.yaml and its data."""
    directory = tmp_path / "capitals"
    directory.mkdir()
    (directory / "task.yaml").write_text(yaml.safe_dump(TASK))
    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return directory


def evaluation_of(make_run, directory: Path, store: Store):
    """The settings that the evaluate stage of a run with this benchmark gets."""
    run = load_run(make_run("capitals", evaluation={"lm_eval": [{"path": str(directory)}], "dtype": "float32"}))
    return gather(run, store).evaluation


def test_readme_says_how_and_the_new_benchmark_is_in_the_report(
    benchmark, make_run, store, tiny_model, make_prompts, make_artifact, run_stage_command
):
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| benchmark |")]
    assert (
        "a directory with lm-eval's `task.yaml` and its data" in row and "`evaluation.lm_eval` of the run config" in row
    )
    answers = [
        {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 1],
         "token_logps": [-1.0] * 3, "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
        for i in range(2)
    ]  # fmt: skip
    inputs = {"prompts": make_prompts(store, 2), "generations": make_artifact(store, "generations", answers)}
    inputs |= {"policy": tiny_model, "start": tiny_model}
    config = evaluation_of(make_run, benchmark, store).model_dump(mode="json")
    done = run_stage_command("evaluate", config, inputs, store)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read_shards(done.stdout.strip().splitlines()[-1], "eval_report").to_pylist()
    (accuracy,) = [row for row in report if row["task"] == "capitals"]
    assert (accuracy["suite"], accuracy["metric"], accuracy["n"], accuracy["task_version"]) == (
        "lm-eval",
        "acc",
        3,
        "1.0, chat template",
    )


def test_another_version_or_question_is_another_key_and_the_same_files_are_the_same_one(benchmark, make_run, store):
    policy = ArtifactRef(kind="checkpoint", key="k", content="c", path="/nowhere")
    store.root.mkdir()  # so that the check of the prompts, the same each time, is remembered

    def key() -> str:
        return STAGES["evaluate"].key(evaluation_of(make_run, benchmark, store), {"policy": policy})

    first = key()
    assert key() == first
    task_file, saved = benchmark / "task.yaml", benchmark.parent / "saved.yaml"
    shutil.copy(task_file, saved)
    task_file.write_text(yaml.safe_dump(TASK | {"metadata": {"version": 2.0}}))
    second = key()
    shutil.copy(saved, task_file)
    with open(benchmark / "questions.jsonl", "a") as file:
        file.write(json.dumps(QUESTIONS[0]) + "\n")
    third = key()
    assert len({first, second, third}) == 3
