"""Following the words of README "I want to add a ..." and of stages/methods/README.md adds a method and a weight provider.

Strategy: the code blocks of the README are what is run. A whole run with both is in tests/flows/test_methods.py.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_contracts.errors import ConfigError
from stages.methods import METHODS
from stages.methods.base import Method
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens, WeightProvider
from tests.stages.methods.outside_package import BROKEN, ROOT, code_blocks, table_lines, write_package
from tests.stages.methods.rows import make_row, step_loss

ROWS = {
    "method (loss)": (
        "`stages/methods/my_method.py`: `Config`, `pair_loss`",
        "`METHODS` in `stages/methods/__init__.py`, a row in its README",
    ),
    "weight provider": (
        "`stages/weighting/weights/my_weights.py`: `Config`, `weights`",
        "`WEIGHTS` in `stages/weighting/weights/__init__.py`, a row in stages/methods/README.md",
    ),
}
"""The rows of README's table that these tests follow."""


@pytest.mark.parametrize("family", ROWS)
def test_the_readme_has_the_row(family):
    write, line = ROWS[family]
    assert f"| {family} | {write} | {line} |" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def in_this_repository(tmp_path, monkeypatch):
    """The files where the README puts them, and the two lines in the tables."""
    for (name, target), source in zip(table_lines(), code_blocks("python"), strict=True):
        module = target.partition(":")[0]
        package, table = (
            (METHODS, "stages.methods")
            if module.startswith("stages.methods")
            else (WEIGHTS, "stages.weighting.weights")
        )
        directory = tmp_path / table
        directory.mkdir()
        (directory / f"{module.rpartition('.')[2]}.py").write_text(source, encoding="utf-8")
        room = importlib.import_module(table)
        monkeypatch.setattr(room, "__path__", [*room.__path__, str(directory)])
        monkeypatch.setitem(package.table, name, target)
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield
    for _, target in table_lines():
        sys.modules.pop(target.partition(":")[0], None)


@pytest.fixture
def in_another_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site", broken=True)))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def own_names(plugin: type) -> set[str]:
    return {name for name in vars(plugin) if not name.startswith("__")}


@pytest.mark.parametrize("place", ["in_this_repository", "in_another_package"])
def test_a_method_of_config_and_pair_loss_has_a_loss(place, request):
    request.getfixturevalue(place)
    method = METHODS.get("slack")
    assert issubclass(method, Method) and own_names(method) == {"Config", "pair_loss"}
    config = METHODS.config({"name": "slack", "beta": 2.0})
    assert config.model_dump() == {"name": "slack", "beta": 2.0} and method.needs(config) == {"reference"}
    rows = [make_row(seed) for seed in range(3)]
    assert step_loss("slack", {}, rows).item() == pytest.approx(step_loss("spin", {"loss": "hinge"}, rows).item())


@pytest.mark.parametrize("place", ["in_this_repository", "in_another_package"])
def test_a_provider_of_config_and_weights_gives_weights(place, request):
    request.getfixturevalue(place)
    provider = WEIGHTS.get("first_tokens")
    assert issubclass(provider, WeightProvider) and own_names(provider) == {"Config", "weights"}
    config = WEIGHTS.config({"name": "first_tokens", "count": 2})
    tokens = Tokens.of([[5, 6, 7], [8]], None, [False, False])
    batch = ResponseBatch(["a/chosen", "a/rejected"], np.array([True, False]), tokens)
    assert provider.weights(config, batch).values.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert WEIGHTS.config({"name": "reverse", "of": "first_tokens"}).of == provider.Config()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "No module named 'my_package.absent'. See where: python -c 'import my_package.absent'"),
        ("misspelt", "has no attribute 'Slakc'"),
        ("raises", "ZeroDivisionError: division by zero"),
        ("settingless", "has no class `Config`"),
        ("baseless", "is not derived from the base class of methods"),
    ],
)
def test_a_broken_plug_in_says_what_is_wrong(in_another_package, name, message):
    with pytest.raises(ConfigError, match=name) as error:
        METHODS.get(name)
    assert message in str(error.value)


def test_a_broken_plug_in_costs_its_own_line_of_the_list_and_no_other(tmp_path):
    site = write_package(tmp_path / "site", broken=True)
    done = subprocess.run(
        [sys.executable, "-m", "stages", "methods"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first_lines = {line.split()[0]: line for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert first_lines.keys() == {*METHODS.table, *BROKEN, "slack"}
    assert first_lines["slack"].split(maxsplit=1)[1] == "Slack: DPO with a hinge in place of the logistic loss."
    assert {name for name, line in first_lines.items() if "cannot be used" in line} == set(BROKEN)


def test_selfplay_methods_lists_a_method_without_source_and_docstring(tmp_path, monkeypatch, capsys):
    (tmp_path / "bare.py").write_text(code_blocks("python")[0].partition("\n")[2].replace('"slack"', '"bare"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS.table, "bare", "bare:Slack")
    importlib.import_module("stages.__main__").print_methods()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == [
        "bare",
        "needs K candidates and a scorer (pairing " + lines[0].partition("(pairing ")[2],
    ]


def test_the_readme_of_methods_writes_to_files_that_are_not_there():
    for _, target in table_lines():
        assert not Path(ROOT, *target.partition(":")[0].split(".")).with_suffix(".py").exists()
