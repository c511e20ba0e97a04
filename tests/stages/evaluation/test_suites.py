"""Every task of every suite runs without a hub, on a mirror with a few questions in the official schema.

The mirror is made by tests/assets/suite_mirror.py. Strategy: one process for all suites, one question per task, the
tiny model; each task must find its data, its examples and its number. What the numbers mean is lm-eval's, and is
compared with its command line in test_lm_eval.py.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_contracts.errors import ConfigError
from stages.evaluation import lm_eval
from stages.evaluation.suites import SUITES

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import json, os, runpy, sys
from pathlib import Path
model, work, tasks_of = sys.argv[1:4]
root = runpy.run_path("tests/assets/suite_mirror.py")["build"](Path(work))
os.environ["NLTK_DATA"] = str(root / "nltk")
from stages.evaluation.lm_eval import evaluate_suite, open_transformers
from stages.models.policy import load_causal_lm
from stages.models.tokens import load_tokenizer
lm = open_transformers(load_causal_lm(model, "float32", "cpu").eval(), load_tokenizer(model), 16)
for suite, only in json.loads(tasks_of).items():
    print("ROWS" + json.dumps(evaluate_suite(lm, suite, str(root), 1, only, allow_code=True)), flush=True)
"""


def runnable(member) -> bool:
    return all(find_spec(name) for name in member.packages)


@pytest.mark.slow
def test_every_task_of_every_suite_runs_on_a_mirror_without_a_hub(tiny_model, tmp_path):
    tasks_of = {suite: [member.task for member in members if runnable(member)] for suite, members in SUITES.items()}
    command = [sys.executable, "-c", CODE, str(tiny_model), str(tmp_path / "mirror"), json.dumps(tasks_of)]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_ALLOW_CODE_EVAL": "0",
        "HF_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [row for line in done.stdout.splitlines() if line.startswith("ROWS") for row in json.loads(line[4:])]
    left_over = {(row["suite"], row["task"], row["metric"]): row for row in rows}
    for suite, members in SUITES.items():
        for member in filter(runnable, members):
            for metric in member.metrics:
                row = left_over.pop((suite, member.task, metric.partition(",")[0]))
                assert 0 <= row["value"] <= 1 and row["n"] >= 1
                assert member.num_fewshot is None or row["n_shot"] == member.num_fewshot
    assert not left_over, "numbers that the suite does not name"
    counts = {row["task"]: row["n"] for row in rows}
    assert (counts["mmlu"], counts["leaderboard_bbh"], counts["leaderboard_gpqa"]) == (57, 24, 3)
    if left := sorted({member.task for members in SUITES.values() for member in members if not runnable(member)}):
        pytest.skip(
            f"all others run; packages of {', '.join(left)} are not installed: pip install 'lm-eval[ifeval,math]'"
        )


def test_a_task_whose_packages_are_missing_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None if name == "math_verify" else object())
    members = lm_eval.check_suite("open_llm_v2")
    with pytest.raises(
        ConfigError, match=r"leaderboard_math_hard of the suite open_llm_v2 imports math_verify.*lm-eval\[ifeval,math\]"
    ):
        lm_eval.check_packages("open_llm_v2", members)
    lm_eval.check_packages("open_llm_v2", lm_eval.check_suite("open_llm_v2", only=("leaderboard_musr",)))


def test_the_data_of_a_task_lies_in_its_directory(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "outside.jsonl").write_text("{}")
    task = {"dataset_kwargs": {"data_files": {"test": "../outside.jsonl"}}}
    (tmp_path / "task" / "task.yaml").write_text(json.dumps(task))
    with pytest.raises(ConfigError, match="names the test file ../outside.jsonl, which lies outside of"):
        lm_eval.load_task(str(tmp_path / "task"))
