"""README: "I want to add a scorer, a pairing, a verifiable instruction, a sampler", followed to the letter.

Strategy: each row of README's table names a file and a table. In a copy of the checkout the file is written and the line
added; then a package beside the checkout declares the same four by entry points. Both times the stages run as processes
of their own: the sampler samples, and the scorer and the instruction score what it sampled, in the pairing's rows.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.shards import read_shards

ROOT = Path(__file__).resolve().parents[2]

SCORER = '''"""Stages - the `exact_match` scorer: 1 for a completion that equals the prompt's `response`, else 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stages.registry import Named
from stages.scoring.base import Candidates, Scorer, Scores


class ExactMatch(Scorer):
    class Config(Named):
        name: Literal["exact_match"] = "exact_match"

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        return [
            Scores.of_points([float(row["completion"] == item.prompt["response"]) for row in item.generations])
            for item in batch
        ]
'''
SAMPLER = '''"""Stages - the `dice` sampler: one of a few words, and the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stages.registry import Named
from stages.sampling.base import Candidate, Prompt, Sampler


class Dice(Sampler):
    class Config(Named):
        name: Literal["dice"] = "dice"
        sides: int = 6

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        return [[self._throw(seed) for seed in prompt.seeds] for prompt in prompts]

    def _throw(self, seed: int) -> Candidate:
        return Candidate([70 + seed % self.config.sides, self.stop_ids[0]], [-1.0, 0.0], "stop")
'''
PAIRING = '''def first_vs_last(group: Group, rules: Rules) -> Choices:
    """The first candidate over the last one."""
    return [Choice(0, len(group.rewards) - 1)]
'''
CHECK = """def _short(completion: Completion, letters: int) -> float:
    return float(len(completion.text) <= letters)
"""


def row_of(name: str) -> list[str]:
    """What is in backquotes in a row of README's table."""
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {name} |")]
    return re.findall(r"`([^`]+)`", row)


def add_line(path: Path, table: str, line: str, before: str = "") -> None:
    """Insert a line as the first entry of a table in a Python file, and a text before the table."""
    lines = path.read_text().split("\n")
    start = next(number for number, text in enumerate(lines) if re.match(rf"{table}\b.* = ", text))
    first = next(number for number in range(start, len(lines)) if re.match(r'\s+"\w+": ', lines[number]))
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    lines[first:first] = [f"{indent}{line},"]
    lines[start:start] = before.split("\n") if before else []
    path.write_text("\n".join(lines))


@pytest.fixture
def copied_checkout(tmp_path) -> Path:
    """A copy of the checkout in which README's four rows were followed."""
    checkout = tmp_path / "checkout"
    for room in ("stages", "data_contracts"):
        shutil.copytree(ROOT / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    file, *parts, table, place = row_of("scorer")
    assert parts == ["Scorer", "Config", "score"]
    (checkout / file).write_text(SCORER)
    module = file.removesuffix(".py").replace("/", ".")
    add_line(checkout / place, table, f'"exact_match": "{module}:ExactMatch"')
    file, *parts, table, place = row_of("sampler")
    assert parts == ["Sampler", "Config", "generate"]
    (checkout / file).write_text(SAMPLER)
    module = file.removesuffix(".py").replace("/", ".")
    add_line(checkout / place, table, f'"dice": "{module}:Dice"')
    file, table = row_of("pairing")
    add_line(checkout / file, table, '"first_vs_last": Pairing(first_vs_last)', PAIRING)
    file, table = row_of("verifiable instruction")
    add_line(checkout / file, table, '"short": Check(_short, COUNT, "at most n letters")', CHECK)
    return checkout


@pytest.fixture
def package(outside_package) -> Path:
    """A package beside the checkout that declares the same four by entry points."""
    groups = row_of("any of them from another package")
    source = f"""
from stages.scoring.checks import COUNT, Check, Completion
from stages.scoring.pairing import Choice, Choices, Group, Pairing, Rules
{SCORER.replace("from __future__ import annotations", "")}
{SAMPLER.replace("from __future__ import annotations", "")}
{PAIRING}
{CHECK}
FIRST_VS_LAST = Pairing(first_vs_last)
SHORT = Check(_short, COUNT, "at most n letters")
"""
    names = {
        "selfplay.scorers": {"exact_match": "my_package:ExactMatch"},
        "selfplay.samplers": {"dice": "my_package:Dice"},
        "selfplay.pairings": {"first_vs_last": "my_package:FIRST_VS_LAST"},
        "selfplay.checks": {"short": "my_package:SHORT"},
    }
    assert names.keys() <= set(groups)
    outside_package("my_package", source, names)
    return ROOT


def run_stage(checkout: Path, stage: str, config: dict, inputs: dict, store, work: Path) -> Path:
    """Build an artifact by the checkout's own command; returns its directory."""
    spec = work / f"{stage}.json"
    spec.write_text(json.dumps({"config": config, "inputs": inputs, "store": str(store.root)}))
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "stages", stage, str(spec)],
        cwd=checkout, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("where", ["copied_checkout", "package"])
def test_what_readme_says_is_enough(where, request, store, make_rows, make_prompts, tiny_model, tmp_path):
    checkout = request.getfixturevalue(where)
    checks = json.dumps([{"name": "short", "value": 100}])
    prompts = make_prompts(store, [row | {"response": "x", "checks": checks} for row in make_rows(2)]).model_dump()
    config = {"backend": {"name": "dice", "sides": 3}, "num_candidates": 4}
    config |= {"max_prompt_tokens": 64, "max_new_tokens": 8}
    inputs = {"prompts": prompts, "policy": str(tiny_model)}
    sampled = run_stage(checkout, "sample", config, inputs, store, tmp_path)
    generations = read_shards(sampled, "generations").to_pylist()
    assert len(generations) == 8 and {row["token_ids"][0] for row in generations} <= {70, 71, 72}
    parts = [{"scorer": {"name": "exact_match"}}, {"scorer": {"name": "checks"}}]
    config = {"scorer": {"name": "combination", "parts": parts}, "pairing": "first_vs_last"}
    inputs = {"prompts": prompts, "generations": sampled.name}
    scored = run_stage(checkout, "score", config, inputs, store, tmp_path)
    rows = read_shards(scored, "scored_pairs").to_pylist()
    assert [(row["chosen_candidate"], row["rejected_candidate"]) for row in rows] == [(0, 3), (0, 3)]
    # exact_match gives 0 to every word, the satisfied instruction 1.
    assert [row["group_scores"] for row in rows] == [[1.0] * 4, [1.0] * 4]


def test_an_exact_match_scorer_takes_no_more_lines_than_elsewhere():
    assert len(SCORER.splitlines()) <= 35
