"""What every method declares, that the README says it, and that a method of another package is found by the same grammar."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.config import field_docstrings
from data_contracts.errors import ConfigError, ContractError
from stages.methods import METHODS
from stages.methods.base import NEEDS, Method, Pairs, Responses
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import NEEDS as WEIGHT_NEEDS
from stages.weighting.weights.base import WeightProvider
from tests.stages.methods.rows import VARIANTS, variant_id

README = Path(sys.modules[Method.__module__].__file__).parent / "README.md"


def table_rows(number: int) -> dict[str, list[str]]:
    """Rows of the first table (methods) or the second (weights), by name."""
    part = README.read_text(encoding="utf-8").split("# Token weights")[number]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| `")
    ]
    return {re.match(r"`(\w+)`", row[0])[1]: row for row in cells}


@pytest.mark.parametrize(("number", "table"), [(0, METHODS), (1, WEIGHTS)], ids=["methods", "weights"])
def test_the_readme_has_a_row_for_every_name_and_for_nothing_else(number, table):
    rows = table_rows(number)
    assert rows.keys() == table.table.keys()
    for name, row in rows.items():
        assert len(row) == 5 and all(row), name
        needs = table.get(name).NEEDS
        assert name in ("reverse", "noise") or set(re.findall(r"`(\w+)`", row[3])) >= needs, name


@pytest.mark.parametrize("name", sorted(METHODS.table))
def test_a_method_declares_itself(name):
    method = METHODS.get(name)
    config = METHODS.config(name)
    assert config.name == name and config == method.Config()
    assert method.VERSION and method.SOURCE and method.needs(config) == method.NEEDS
    assert method.WEIGHTS is None or method.WEIGHTS in WEIGHTS.table
    assert method.sides(config) == method.SIDES
    assert sys.modules[method.__module__].__doc__.startswith("Method - ")
    described = field_docstrings(type(config))
    for field in type(config).model_fields:
        assert field == "name" or described[field], f"{name}.{field} has no docstring"


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=variant_id)
def test_a_method_asks_only_for_what_the_table_explains(name, settings):
    method = METHODS.get(name)
    assert method.needs(method.Config(**settings)) <= NEEDS.keys()


@pytest.mark.parametrize("name", sorted(WEIGHTS.table))
def test_a_weight_provider_declares_itself(name):
    provider, config = WEIGHTS.get(name), WEIGHTS.config(name)
    assert issubclass(provider, WeightProvider) and config.name == name
    assert provider.VERSION and provider.SOURCE and provider.needs(config) == provider.NEEDS <= WEIGHT_NEEDS.keys()
    described = field_docstrings(type(config))
    for field in type(config).model_fields:
        assert field == "name" or described[field], f"{name}.{field} has no docstring"


def test_settings_are_validated_without_torch():
    code = (
        "import sys\nfrom stages.methods import METHODS\nfrom stages.weighting.weights import WEIGHTS\n"
        "[table.config(name) for table in (METHODS, WEIGHTS) for name in table.table]\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match="kl_mod"):
        METHODS.config({"name": "swift", "kl_mod": "paper"})
    with pytest.raises(ValueError, match="must not exceed"):
        WEIGHTS.config({"name": "swift", "L": 2.0})
    with pytest.raises(ConfigError, match="Did you mean 'tis_dpo'"):
        METHODS.get("tis-dpo")


@pytest.mark.parametrize("table", [METHODS, WEIGHTS], ids=["methods", "weights"])
def test_the_hooks_of_a_plug_in_take_its_own_config(table):
    for name in table.table:
        for hook, function in vars(table.get(name)).items():
            if isinstance(function, staticmethod | classmethod):
                annotation = inspect.signature(function.__func__).parameters["config"].annotation
                assert annotation == "Config", f"{name}.{hook} takes a {annotation}"


def test_a_loss_that_reads_what_was_not_supplied_names_the_need():
    side = Responses.unpadded([[-1.0]], reference_logps=[[-1.0]])
    tdpo, dpo = METHODS.get("tdpo"), METHODS.get("dpo")
    with pytest.raises(ContractError, match="put 'kl_reference_policy' into NEEDS"):
        tdpo.pair_loss(tdpo.Config(), Pairs(side, side))
    with pytest.raises(ContractError, match="put 'reference' into NEEDS"):
        dpo.pair_loss(dpo.Config(), Pairs(side, side._replace(reference_logps=None)))
    with pytest.raises(ContractError, match="compares two responses, and these rows have one"):
        dpo.pair_loss(dpo.Config(), Pairs(side))
