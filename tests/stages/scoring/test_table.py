"""Tables that other packages extend: pairings and checks by name."""

import pytest

from data_contracts.errors import ConfigError
from stages.scoring.checks import validate_checks
from stages.scoring.pairing import PAIRINGS, each
from stages.scoring.stage import ScoringConfig

SOURCE = """
from stages.scoring.pairing import Pairing, each
ONE_BY_ONE = Pairing(each, candidates=1, is_single=True)
"""


@pytest.fixture
def package(outside_package):
    points = {
        "one_by_one": "pairs:ONE_BY_ONE",
        "absent": "pairs:NOTHING",
        "other": "pairs:each",
        "each": "pairs:NOTHING",
    }
    return outside_package("pairs", SOURCE, {"selfplay.pairings": points, "selfplay.checks": {"absent": "nowhere:X"}})


def test_an_entry_of_another_package_stands_behind_ours_and_cannot_replace_one(package):
    assert PAIRINGS.names()[-3:] == ["absent", "one_by_one", "other"]
    assert PAIRINGS.get("one_by_one").choose is PAIRINGS.get("each").choose is each
    assert ScoringConfig(pairing="one_by_one").identity()["pairing"] == "one_by_one"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "pairings 'absent' is registered as 'pairs:NOTHING', which does not load: AttributeError"),
        ("other", r"pairings 'other' \(pairs:each\) is no Pairing"),
        ("one_by_two", "unknown pairing 'one_by_two'; known: best_vs_worst, .*Did you mean 'one_by_one'"),
    ],
)
def test_an_entry_that_cannot_be_used_says_why(package, name, message):
    with pytest.raises(ConfigError, match=message):
        PAIRINGS.get(name)
    with pytest.raises(ValueError, match=message):
        ScoringConfig(pairing=name)


def test_a_check_of_a_broken_package_is_refused_before_anything_runs(package):
    with pytest.raises(ConfigError, match="checks 'absent' is registered as 'nowhere:X', which does not load"):
        validate_checks([{"name": "absent"}])


def test_the_form_of_a_run_lists_every_pairing():
    assert ScoringConfig.model_json_schema()["properties"]["pairing"]["anyOf"][0]["enum"] == PAIRINGS.names()
