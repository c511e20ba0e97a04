"""README: "I want to add an evaluator", followed to the letter in a copy of the checkout.

Strategy: README's row names the files and the table. The new evaluator counts words instead of asking a judge; the
stage runs as a process of its own and writes its number into eval_report. Reports without it keep their keys: the new
field is neutral.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.shards import read_shards

ROOT = Path(__file__).resolve().parents[3]
EVALUATOR = '''"""Stages - Verbosity: how many words the policy writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.evaluation.rows import report_row


def load(directory: str | Path, limit: int | None = None) -> list[str]:
    """The questions: a JSON list."""
    return json.loads((Path(directory) / "questions.json").read_text())[:limit]


def report(answers: list[str]) -> list[dict[str, Any]]:
    """One row of eval_report."""
    words = sum(len(text.split()) for text in answers) / len(answers)
    return [report_row("verbosity", "verbosity", "words", words, len(answers))]
'''
SETTINGS = '''class Verbosity(Judged):
    """Questions whose answers are counted in words."""


def evaluate_verbosity(job: Job, config: Verbosity, device: str) -> list[dict[str, Any]]:
    """Rows of eval_report."""
    return verbosity.report(list(_answers(job, config, verbosity.load(config.path, config.limit), 0.0, device)))


'''


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the checkout in which README's row was followed."""
    (row,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| evaluator (judged) |")
    ]
    for word in (
        "`stages/evaluation/my_evaluator.py`: `load`",
        "`judged.py`",
        "`BENCHMARKS`",
        "`stages/evaluation/stage.py`",
    ):
        assert word in row
    copy = tmp_path / "checkout"
    for room in ("stages", "data_contracts"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    directory = copy / "stages" / "evaluation"
    (directory / "verbosity.py").write_text(EVALUATOR)
    judged, stage = directory / "judged.py", directory / "stage.py"
    replace(
        judged, "import alpaca_eval, arena_hard, mt_bench\n", "import alpaca_eval, arena_hard, mt_bench, verbosity\n"
    )
    replace(judged, "class Benchmark(NamedTuple):", SETTINGS + "class Benchmark(NamedTuple):")
    line = '    "verbosity": Benchmark(5, verbosity.load, evaluate_verbosity),\n'
    replace(judged, "BENCHMARKS = {\n", "BENCHMARKS = {\n" + line)
    replace(
        stage,
        "import BENCHMARKS, AlpacaEval, ArenaHard, MTBench\n",
        "import BENCHMARKS, AlpacaEval, ArenaHard, MTBench, Verbosity\n",
    )
    replace(
        stage,
        "    arena_hard: ArenaHard | None = None\n",
        "    verbosity: Verbosity | None = None\n    arena_hard: ArenaHard | None = None\n",
    )
    return copy


def evaluate(checkout: Path, config: dict, inputs: dict, store, work: Path) -> Path:
    """Build an eval_report by the checkout's own command; returns its directory."""
    spec = work / "spec.json"
    spec.write_text(json.dumps({"config": config, "inputs": inputs, "store": str(store.root)}))
    done = subprocess.run(
        [sys.executable, "-m", "stages", "evaluate", str(spec)], cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return Path(done.stdout.strip().splitlines()[-1])


def test_what_readme_says_is_enough_and_reports_without_it_keep_their_keys(
    checkout, store, tiny_model, make_prompts, make_artifact, tmp_path
):
    answers = [
        {"prompt_id": f"p{i:03d}", "candidate": 0, "prompt_ids": [60, 61], "token_ids": [70 + i, 80, 1],
         "token_logps": [-1.0] * 3, "finish_reason": "stop", "seed": 0, "completion": f"word {i}"}
        for i in range(2)
    ]  # fmt: skip
    inputs = {"prompts": make_prompts(store, 2).model_dump()}
    inputs |= {"generations": make_artifact(store, "generations", answers).model_dump()}
    inputs |= {"policy": str(tiny_model), "start": str(tiny_model)}
    questions = tmp_path / "questions"
    questions.mkdir()
    (questions / "questions.json").write_text(json.dumps(["How are you?", "What is red?"]))
    plain = {"scorer": {"name": "length", "target_tokens": 3}, "dtype": "float32"}
    verbosity = {"path": str(questions), "judge": "nobody", "backend": {"name": "canned"}, "max_new_tokens": 8}
    report = evaluate(checkout, plain | {"verbosity": verbosity}, inputs, store, tmp_path)
    (row,) = [row for row in read_shards(report, "eval_report").to_pylist() if row["task"] == "verbosity"]
    assert (row["metric"], row["n"]) == ("words", 2) and row["value"] > 0
    without = evaluate(checkout, plain, inputs, store, tmp_path)
    assert evaluate(ROOT, plain, inputs, store, tmp_path) == without  # the same key: found, not built
