"""lm-eval in the loop: our rows against its own command line, official tasks from a mirror, both backends.

Strategy: the tiny model answers at chance, which is enough for parity; what the numbers mean is checked once, on
SmolLM2 (slow).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_contracts.config import parse
from data_contracts.errors import ConfigError
from data_contracts.shards import read_shards
from stages.evaluation.lm_eval import check_suite, load_task
from stages.evaluation.stage import EvaluationConfig
from stages.evaluation.suites import SUITES

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "deploy" / "evals" / "quickstart_mc"


def run_python(code: str, *arguments: object, timeout: float = 500, **environment: str) -> str:
    """In a process of its own: lm-eval and vLLM change the one they live in."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | quiet | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


LOCAL_ROWS = """
import json, sys
from stages.evaluation.lm_eval import evaluate, load_task
from stages.models.policy import load_causal_lm
from stages.models.tokens import load_tokenizer
model, task = sys.argv[1:3]
rows = evaluate(load_causal_lm(model, "float32", "cpu").eval(), load_tokenizer(model), [load_task(task)], 16, None)
print("ROWS" + json.dumps(rows))
"""


def test_our_rows_are_those_of_lm_evals_own_command_line(tiny_model, tmp_path):
    rows = json.loads(run_python(LOCAL_ROWS, tiny_model, QUICKSTART).partition("ROWS")[2])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(yaml.safe_dump(load_task(str(QUICKSTART))))
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tiny_model},dtype=float32,max_length=2048",
        "--tasks",
        "quickstart_mc",
    ]
    arguments += [
        "--include_path",
        tmp_path / "tasks",
        "--device",
        "cpu",
        "--batch_size",
        "16",
        "--output_path",
        tmp_path / "out",
    ]
    printed = run_python("import sys; from lm_eval.__main__ import cli_evaluate; cli_evaluate()", *arguments)
    reference = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["quickstart_mc"]
    assert {row["metric"] for row in rows} == {"acc", "acc_norm"}
    for row in rows:
        assert row["value"] == pytest.approx(reference[f"{row['metric']},none"], abs=1e-12)
        assert row["stderr"] == pytest.approx(reference[f"{row['metric']}_stderr,none"], abs=1e-12)
        line = re.search(rf"\|{row['metric']} *\|[^|]*\|([^|]*)\|[^|]*\|([^|]*)\|", printed)
        assert (f"{row['value']:.4f}", f"{row['stderr']:.4f}") == (line[1].strip(), line[2].strip())
        assert (row["suite"], row["task"], row["n"], row["n_shot"], row["task_version"]) == (
            "lm-eval",
            "quickstart_mc",
            60,
            2,
            "1.0",
        )


SUITE_ROWS = """
import json, sys
from stages.evaluation.lm_eval import evaluate_suite, open_transformers
from stages.models.policy import load_causal_lm
from stages.models.tokens import load_tokenizer
model, root = sys.argv[1:3]
lm = open_transformers(load_causal_lm(model, "float32", "cpu").eval(), load_tokenizer(model), 16)
print("ROWS" + json.dumps(evaluate_suite(lm, "open_llm_v1", root, 12, ("arc_challenge",))))
try:
    evaluate_suite(lm, "open_llm_v1", root, 2, ("winogrande",))
except Exception as error:
    print("ERROR" + str(error))
"""


def test_an_official_task_reads_its_data_from_a_mirror(tiny_model, shared, tmp_path):
    with open(shared / "data" / "multiple_choice" / "arc_challenge.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(60), strict=False)]
    mirror = tmp_path / "ai2_arc"
    mirror.mkdir()
    docs = [
        {
            "id": str(i),
            "question": row["query"].removeprefix("Question: "),
            "choices": {"text": row["choices"], "label": list("ABCDEFG"[: len(row["choices"])])},
            "answerKey": "ABCDEFG"[row["gold"]],
        }
        for i, row in enumerate(rows)
    ]
    for split, part in {"train": docs[:30], "validation": docs[30:32], "test": docs[32:]}.items():
        (mirror / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in part))
    files = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "validation", "test")]
    (mirror / "README.md").write_text(
        "---\n" + yaml.safe_dump({"configs": [{"config_name": "ARC-Challenge", "data_files": files}]}) + "---\n"
    )
    out = run_python(SUITE_ROWS, tiny_model, tmp_path)
    (row,) = json.loads(out.partition("ROWS")[2].partition("\n")[0])
    assert (row["suite"], row["task"], row["metric"], row["n"], row["n_shot"]) == (
        "open_llm_v1",
        "arc_challenge",
        "acc_norm",
        12,
        25,
    )
    assert 0 <= row["value"] <= 1
    assert row["stderr"] > 0
    clones = f"neither {tmp_path}/allenai/winogrande nor {tmp_path}/winogrande"
    assert f"the data of allenai/winogrande is not in data_root: {clones}" in out


def test_every_suite_names_tasks_that_lm_eval_has():
    code = "import json; from lm_eval.tasks import TaskManager\n"
    code += "print('NAMES' + json.dumps(sorted(TaskManager().all_tasks)))"
    names = set(json.loads(run_python(code).partition("NAMES")[2]))
    assert {member.task for suite in SUITES.values() for member in suite} <= names


def test_suites_are_checked_before_anything_runs():
    with pytest.raises(ConfigError, match="runs code that the model wrote"):
        check_suite("tidpo")
    assert "humaneval" not in [member.task for member in check_suite("tidpo", only=("mmlu", "gsm8k"))]
    with pytest.raises(ConfigError, match="has no task"):
        check_suite("open_llm_v1", only=("arc",))
    with pytest.raises(ConfigError, match="suites.0: humaneval of the suite tidpo runs code"):
        parse(EvaluationConfig, {"scorer": {"name": "length"}, "suites": [{"name": "tidpo"}]}, "x")


def test_a_config_without_the_new_options_keeps_its_identity():
    config = EvaluationConfig.model_validate(
        {"scorer": {"name": "length", "target_tokens": 8}, "lm_eval": [{"path": "x"}]}
    )
    assert set(config.identity()) == {"scorer", "lm_eval", "dtype"}
    assert set(config.identity()["lm_eval"][0]) == {"path", "limit", "digest"}
    with_suite = config.model_copy(update={"suites": ({"name": "open_llm_v1"},)})
    assert "suites" in with_suite.identity()


def test_the_stage_writes_the_benchmarks_beside_the_heldout_numbers(
    store, tiny_model, make_prompts, make_artifact, run_stage_command
):
    prompts = make_prompts(store, 4)
    rows = [
        {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 1], 
         "token_logps": [-1.0] * 3, "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
        for i in range(4)
    ]  # fmt: skip
    inputs = {
        "prompts": prompts,
        "generations": make_artifact(store, "generations", rows),
        "policy": tiny_model,
        "start": tiny_model,
    }
    config = {
        "scorer": {"name": "length", "target_tokens": 3},
        "lm_eval": [{"path": str(QUICKSTART), "limit": 6}],
        "dtype": "float32",
    }
    done = run_stage_command("evaluate", config, inputs, store)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read_shards(done.stdout.strip().splitlines()[-1], "eval_report").to_pylist()
    assert {(row["suite"], row["metric"]) for row in report} >= {
        ("heldout", "score"),
        ("lm-eval", "acc"),
        ("lm-eval", "acc_norm"),
    }
    assert {row["n"] for row in report if row["suite"] == "lm-eval"} == {6}


LOGLIKS = """
import json, sys
if __name__ == "__main__":
    from stages.evaluation import lm_eval
    backend, model, task = sys.argv[1:4]
    if backend == "vllm":
        lm = lm_eval.open_vllm(model, "float32", "cpu", {"max_model_len": 512, "max_num_batched_tokens": 4096})
    else:
        from stages.models.policy import load_causal_lm
        from stages.models.tokens import load_tokenizer
        lm = lm_eval.open_transformers(load_causal_lm(model, "float32", "cpu").eval(), load_tokenizer(model), 16)
    from lm_eval.tasks import TaskManager
    result = lm_eval._evaluate(lm, [lm_eval.load_task(task)], TaskManager(include_defaults=False), None)
    samples = sorted(result["samples"]["arc_easy_100"], key=lambda sample: sample["doc_id"])
    row = next(row for row in lm_eval._rows(result, "lm-eval", "arc_easy_100") if row["metric"] == "acc")
    log_probs = [resp[0][0] for sample in samples for resp in sample["resps"]]
    print("FOUND" + json.dumps([row["value"], log_probs]), flush=True)
    import os
    os._exit(0)
"""


@pytest.fixture
def smollm2():
    pytest.importorskip("vllm")
    model = ROOT / "models" / "smollm2-135m-instruct"
    if not (model / "config.json").is_file():
        pytest.skip(f"{model} is not there: run deploy/setup/get_smollm2.py")
    return model


@pytest.fixture
def arc_easy(shared, tmp_path):
    """A local task: the first 100 questions, scored as the official task scores them."""
    with open(shared / "data" / "multiple_choice" / "arc_easy.jsonl", encoding="utf-8") as file:
        (tmp_path / "test.jsonl").write_text("".join(line for line, _ in zip(file, range(100), strict=False)))
    task = {
        "task": "arc_easy_100",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.mark.slow
def test_arc_easy_on_smollm2_is_right_and_equal_on_both_backends(smollm2, arc_easy):
    results = {
        backend: json.loads(
            run_python(LOGLIKS, backend, smollm2, arc_easy, OMP_NUM_THREADS="2")
            .partition("FOUND")[2]
            .partition("\n")[0]
        )
        for backend in ("transformers", "vllm")
    }
    (accuracy, log_probs), (vllm_accuracy, vllm_log_probs) = results["transformers"], results["vllm"]
    assert accuracy == vllm_accuracy == pytest.approx(0.46, abs=0.02)
    assert len(log_probs) == len(vllm_log_probs) >= 398
    assert max(abs(a - b) for a, b in zip(log_probs, vllm_log_probs, strict=True)) < 1e-4


@pytest.mark.slow
def test_the_whole_stage_runs_on_vllm(smollm2, arc_easy, store, make_prompts, make_artifact, run_stage_command):
    """lm-eval's engine, then the policy's and the start model's answers to MT-Bench: three engines in one process."""
    rows = [
        {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 2], 
         "token_logps": [-1.0] * 3, "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
        for i in range(2)
    ]  # fmt: skip
    inputs = {
        "prompts": make_prompts(store, 2),
        "generations": make_artifact(store, "generations", rows),
        "policy": smollm2,
        "start": smollm2,
    }
    bench = {
        "judge": "x",
        "max_new_tokens": 16,
        "limit": 2,
        "baseline": "start",
        "backend": {"name": "vllm", "dtype": "float32"},
    }
    bench["runtime"] = {"base_url": "http://127.0.0.1:9/v1", "retries": 0}
    config = {
        "scorer": {"name": "length", "target_tokens": 3},
        "dtype": "float32",
        "lm_eval": [{"path": str(arc_easy)}],
        "mt_bench": bench,
    }
    config["runtime"] = {"lm_eval_backend": "vllm", "vllm": {"max_model_len": 512, "max_num_batched_tokens": 4096}}
    done = run_stage_command("evaluate", config, inputs, store, OMP_NUM_THREADS="2")
    assert done.returncode == 75, done.stderr[-3000:]  # the judge is away; all other parts are written
    (directory,) = (store.root / "artifacts" / "eval_report").iterdir()
    report = {(row["task"], row["metric"]): row for row in read_shards(directory, "eval_report").to_pylist()}
    accuracy = report["arc_easy_100", "acc"]
    assert (accuracy["value"], accuracy["n"]) == (pytest.approx(0.46, abs=0.02), 100)
    answers = [
        json.loads(line)["choices"][0]["turns"]
        for line in (directory / "mt_bench_answers.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 2 and all(len(turns) == 2 and all(turns) for turns in answers)
