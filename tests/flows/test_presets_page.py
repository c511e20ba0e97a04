"""docs/presets.md: every preset has its section, and each value that it names is the file's.

Strategy: the tables are read as a reader does, and the files as a run does, with what they extend.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_contracts.config import flatten, read_yaml
from flows.config import read_run

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "deploy" / "runs"
PRESETS = sorted(path.stem for path in RUNS.glob("*.yaml"))
SOURCES = {"paper", "code", "fork", "proof", "ours"}
SECTIONS = (
    "policy", "models", "iterations", "method", "reference", "history", "mix_previous", "sampling", "scoring",
    "weighting", "warm_start", "learning_rates", "training", "auxiliary",
)  # fmt: skip
"""Parts of a run config that make a method's numbers."""


def sections() -> dict[str, list[list[str]]]:
    """Preset -> rows of its table, without the marks of code."""
    parts = re.split(r"^## `(.+)`$", (ROOT / "docs" / "presets.md").read_text(), flags=re.MULTILINE)
    tables = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
        tables[name] = [[cell.strip("` |") for cell in row] for row in rows]
    return tables


def value_at(settings: dict[str, Any], path: str) -> Any:
    value: Any = settings
    for name in path.split("."):
        assert name in value, f"{path} is not set"
        value = value[name]
    return value


def test_every_preset_has_its_section_and_every_section_its_preset():
    assert sorted(sections()) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_values_of_the_page_are_those_of_the_file(name):
    settings, table = read_run(RUNS / f"{name}.yaml"), sections()[name]
    for setting, value, source, *_ in table:
        assert value_at(settings, setting) == yaml.safe_load(value), setting
        assert source in SOURCES, setting


@pytest.mark.parametrize("name", PRESETS)
def test_everything_that_a_preset_sets_itself_is_in_its_table(name):
    named = [row[0] for row in sections()[name]]
    own = [
        setting
        for setting in flatten(read_yaml(RUNS / f"{name}.yaml"))
        if setting.partition(".")[0] in SECTIONS and ".runtime." not in setting
    ]
    missing = [setting for setting in own if not any(setting == row or setting.startswith(f"{row}.") for row in named)]
    assert missing == []
    assert len(set(named)) == len(named)
