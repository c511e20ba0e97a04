"""lm-eval in the loop: our rows against its own command line, official tasks from a mirror, both backends.

Strategy: the tiny model answers at chance, which is enough for parity; what the numbers mean is checked once, on
SmolLM2 (slow).
"""

import json
import os
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


ASKED = {
    "as on a base model": ({"chat_template": "off", "max_length": 2048}, [], "max_length=2048"),
    "through the template": ({}, ["--apply_chat_template"], ""),
    "examples in one turn": (
        {"chat_template": "on", "fewshot_as_multiturn": False},
        ["--apply_chat_template", "--fewshot_as_multiturn", "false"],
        "",
    ),
    "with a system message and other settings of generation": (
        {"system": "Be brief.", "gen_kwargs": {"max_gen_toks": 5}, "max_length": 120},
        ["--apply_chat_template", "--system_instruction", "Be brief.", "--gen_kwargs", "max_gen_toks=5"],
        "max_length=120",
    ),
}
"""Name -> settings of Prompting, what lm-eval's command line calls them, and the model's arguments there."""

OUR_ROWS = """
import json, sys
from stages.evaluation import lm_eval
if __name__ == "__main__":
    backend, model, tasks, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    if backend == "vllm":
        lm = lm_eval.open_vllm(model, "float32", "cpu", {})
    else:
        from stages.models.policy import load_causal_lm
        from stages.models.tokens import load_tokenizer
        lm = lm_eval.open_transformers(load_causal_lm(model, "float32", "cpu").eval(), load_tokenizer(model), 16)
    rows = [
        [task, name, lm_eval.evaluate_task(lm, task, 20, lm_eval.Prompting(**settings))]
        for task in tasks for name, settings in asked.items()
    ]
    print("ROWS" + json.dumps(rows), flush=True)
    import os
    os._exit(0)
"""
COMMAND_LINES = """
import json, sys
from stages.evaluation.lm_eval import _name_vllms_version
from stages.sampling.vllm import prepare_environment
if "vllm" in sys.argv[1]:
    prepare_environment("cpu")
    _name_vllms_version()
from lm_eval.__main__ import cli_evaluate
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    cli_evaluate()
"""


@pytest.fixture
def generation_task(tmp_path):
    """A local task that generates: a question with a solved example before it, judged by the exact answer."""
    directory = tmp_path / "generation"
    directory.mkdir()
    for split in ("train", "test"):
        rows = [
            {"question": f"Say {word} for {split}.", "answer": word} for word in ("yes", "no", "a", "the", "word") * 5
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "say", "dataset_path": "json", "output_type": "generate_until", "num_fewshot": 1,
        "dataset_kwargs": {"data_files": {"train": "train.jsonl", "test": "test.jsonl"}},
        "training_split": "train", "test_split": "test", "fewshot_split": "train",
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}, {"metric": "chrf"}], "metadata": {"version": 1.0},
    }  # fmt: skip
    (directory / "task.yaml").write_text(yaml.safe_dump(task))
    return directory


MODEL_ARGUMENTS = {
    "hf": "dtype=float32",
    "vllm": "dtype=float32,seed=0,enforce_eager=True,kv_cache_memory_bytes=536870912,enable_chunked_prefill=False,"
    "max_num_batched_tokens=8192",
}


def check_parity(model: Path, backend: str, tasks: list[Path], work: Path, names: list[str]) -> dict[tuple, list[dict]]:
    """Our rows, which equal what lm-eval's own command line writes, however the model is asked."""
    asked = {name: ASKED[name] for name in names}
    settings = json.dumps({name: settings for name, (settings, _, _) in asked.items()})
    out = run_python(OUR_ROWS, backend, model, json.dumps([str(task) for task in tasks]), settings)
    ours = {(task, name): rows for task, name, rows in json.loads(out.partition("ROWS")[2])}
    lines = []
    for task in tasks:
        directory = work / "tasks" / task.name
        directory.mkdir(parents=True)
        loaded = load_task(str(task))
        (directory / "task.yaml").write_text(yaml.safe_dump(loaded))
        for number, (_, options, more) in enumerate(asked.values()):
            arguments = ",".join(filter(None, [f"pretrained={model}", MODEL_ARGUMENTS[backend], more]))
            lines.append(
                ["run", "--model", backend, "--model_args", arguments, "--tasks", loaded["task"], "--limit", "20",
                 "--include_path", str(directory), "--output_path", str(work / "out" / task.name / str(number)),
                 "--batch_size", {"hf": "16", "vllm": "auto"}[backend], *options]
            )  # fmt: skip
            lines[-1] += ["--device", "cpu"] if backend == "hf" else []
    run_python(COMMAND_LINES, json.dumps(lines))
    for task in tasks:
        for number, name in enumerate(asked):
            (path,) = (work / "out" / task.name / str(number)).rglob("results_*.json")
            (reference,) = json.loads(path.read_text())["results"].values()
            rows = [row for row in ours[str(task), name] if row["metric"] != "cut_prompts"]
            metrics = {key.partition(",")[0] for key in reference if "," in key and "stderr" not in key}
            assert {row["metric"] for row in rows} == metrics
            for row in rows:
                assert row["value"] == pytest.approx(reference[f"{row['metric']},none"], abs=1e-12), (task, name, row)
                if row["stderr"] is not None:
                    assert row["stderr"] == pytest.approx(reference[f"{row['metric']}_stderr,none"], abs=1e-12)
    values = [tuple(row["value"] for row in ours[str(tasks[-1]), name]) for name in asked]
    assert len(set(values)) > 1  # to be asked otherwise makes a difference
    return ours


def test_our_rows_are_those_of_lm_evals_own_command_line(tiny_model, generation_task, tmp_path):
    ours = check_parity(tiny_model, "hf", [QUICKSTART, generation_task], tmp_path, list(ASKED))
    rows = [ours[str(QUICKSTART), name] for name in ASKED]
    assert [part[0]["task_version"] for part in rows] == [
        "1.0",
        "1.0, chat template, examples as turns",
        "1.0, chat template",
        "1.0, chat template, examples as turns, system message",
    ]
    assert "cut_prompts" not in {row["metric"] for row in rows[0]}
    (cut,) = [row for row in rows[-1] if row["metric"] == "cut_prompts"]
    assert 0 < cut["value"] <= cut["n"] == 20


@pytest.mark.slow
def test_they_are_on_vllm_too(smollm2, generation_task, tmp_path):
    check_parity(
        smollm2, "vllm", [generation_task, QUICKSTART], tmp_path, ["as on a base model", "through the template"]
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
    row, cut = json.loads(out.partition("ROWS")[2].partition("\n")[0])
    assert (cut["metric"], cut["value"], cut["n"]) == ("cut_prompts", 12, 12)  # 25 examples, a context of 256 tokens
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
    assert set(config.identity()["lm_eval"][0]) == {"path", "limit", "digest", "chat_template"}
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
    asked = lm_eval._asked_by(lm, lm_eval.AS_THE_COMMAND_LINE, False)
    result = lm_eval._evaluate(lm, [lm_eval.load_task(task)], TaskManager(include_defaults=False), None, asked)
    samples = sorted(result["samples"]["arc_easy_100"], key=lambda sample: sample["doc_id"])
    row = next(row for row in lm_eval._rows(lm, result, "lm-eval", "arc_easy_100", asked) if row["metric"] == "acc")
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
        "lm_eval": [{"path": str(arc_easy), "chat_template": "off"}],
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
