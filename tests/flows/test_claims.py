"""Claims: every comparison of deploy/runs/claims says what it tries, and the rule that decides is the one that docs/evidence.md states.

A comparison with claims is played end to end by `benchmarks.claims --smoke` (tests/test_benchmarks.py).
"""

import json

import numpy as np
import pytest
import yaml

from benchmarks._story_prompts import PROMPTS, SIZES, rows
from benchmarks.claims import FILES, TITLES
from data_contracts.errors import ConfigError
from flows.claims import MEASURES, difference, verdict
from flows.comparison import Claim, load_comparison
from stages.evaluation.intervals import Interval

ABOVE, UNSURE, BELOW = Interval(0.2, 0.1, 0.3, 0.05), Interval(0.0, -0.1, 0.1, 0.05), Interval(-0.2, -0.3, -0.1, 0.05)
UNKNOWN = Interval(0.2, float("nan"), float("nan"), float("nan"))


@pytest.mark.parametrize("name", FILES)
def test_a_comparison_tries_claims_with_three_seeds_in_both_sizes(name):
    comparison = load_comparison(FILES[name])
    assert len(comparison.config.seeds) >= 3 and comparison.config.claims and name in TITLES
    large = load_comparison(FILES[name], size="gpu")
    assert large.config.name == f"{comparison.config.name}-gpu"
    assert [variant.name for variant in large.variants] == [variant.name for variant in comparison.variants]
    assert {variant.config.policy.path for variant in large.variants} != {
        variant.config.policy.path for variant in comparison.variants
    }


def test_every_file_of_claims_is_run_by_make_claims():
    directory = FILES["swift"].parent
    shared = {"base.yaml", "gpu.yaml"}
    assert {path.name for path in directory.glob("*.yaml")} - shared == {
        path.name for path in FILES.values() if path.parent == directory
    }


def test_each_paper_has_two_claims_at_least():
    sources = [claim.source for path in FILES.values() for claim in load_comparison(path).config.claims]
    for paper in ("SWIFT", "SPPO", "TGDPO", "TI-DPO", "TIS-DPO"):
        assert sum(source.startswith(f"{paper},") for source in sources) >= 2, paper


@pytest.mark.parametrize(
    ("intervals", "equal_within", "decided"),
    [
        ([ABOVE], None, "as claimed"),
        ([ABOVE, ABOVE], None, "as claimed"),
        ([ABOVE, UNSURE], None, "not decided"),
        ([UNKNOWN], None, "not decided"),
        ([ABOVE, UNSURE, BELOW], None, "against"),
        ([UNSURE, UNSURE], 0.2, "as claimed"),
        ([UNSURE, UNKNOWN], 0.2, "not decided"),
        ([UNSURE], 0.05, "not decided"),
        ([UNSURE, BELOW], 0.09, "against"),
        ([ABOVE], 0.2, "not decided"),
    ],
)
def test_the_verdict(intervals, equal_within, decided):
    assert verdict(intervals, equal_within) == decided


def test_a_measure_of_whole_trainings_has_students_interval_over_the_seeds():
    interval = difference(np.array([[3.0], [2.0], [4.0]]), np.ones((3, 1)))
    half = 4.303 * 1.0 / 3**0.5  # the spread of 2, 1, 3 is 1
    assert interval[:3] == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_the_interval_over_seeds_and_prompts_is_wider_than_over_prompts_alone_where_seeds_differ():
    generator = np.random.default_rng(0)
    prompts = generator.normal(0, 0.1, (3, 96))
    agreeing, differing = prompts + 0.1, prompts + np.array([[0.0], [0.1], [0.2]])
    narrow, wide = (difference(values, np.zeros((3, 96))) for values in (agreeing, differing))
    assert narrow.low > 0.07 and narrow.high < 0.13
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert wide.mean == pytest.approx(narrow.mean)


def test_a_claim_about_a_variant_that_is_not_there_is_refused(tmp_path):
    body = yaml.safe_load(FILES["sppo"].read_text())
    body |= {"base": str(FILES["sppo"].parent / "base.yaml")}
    body["claims"][0]["order"] = ["sppo", "dop"]
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(ConfigError, match="orders dop, and the variants are dpo, ipo, sppo"):
        load_comparison(path)


def test_a_size_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no size is called 'moon'; there are gpu"):
        load_comparison(FILES["swift"], size="moon")


def test_every_measure_can_be_named_and_every_name_is_one():
    assert set(MEASURES) == set(Claim.model_fields["measure"].annotation.__args__)


@pytest.mark.parametrize("name", SIZES)
def test_the_stories_are_those_that_their_generator_writes(name):
    lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows(name) and len(lines) == SIZES[name]


def test_rejected_endings_differ_in_a_few_words():
    for name in SIZES:
        for row in rows(name):
            chosen, rejected = row["chosen"].split(), row["rejected"].split()
            slips = sum(a != b for a, b in zip(chosen, rejected, strict=True))
            assert 1 <= slips <= 2, row["prompt_id"]
