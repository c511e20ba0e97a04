"""Every example in a docstring runs, and prints what the docstring says.

Strategy: doctest on each module of the four rooms that has an example; the others are not imported.
"""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_contracts", "stages", "tasks", "flows")


def modules_with_examples() -> list[str]:
    paths = [
        path
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if re.search(r"^ *>>> ", path.read_text(), re.M)
    ]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_there_are_examples_to_run():
    assert {"data_contracts.identity", "stages.methods.base"} <= set(modules_with_examples())


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_run(name, capsys):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0 and results.failed == 0, capsys.readouterr().out
