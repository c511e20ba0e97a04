"""Chosen and rejected told apart by last token, first token or length alone: shares by hand, and a stage that says so.

Strategy: small sets of ids; one score stage whose given pairs end or begin differently.
"""

import random

import numpy as np
import pyarrow as pa
import pytest

from data_contracts.checkpoint import external_model
from stages.execute import execute
from stages.scoring.shortcuts import FEWEST, LIMIT, Ends, causes, sentences, told_apart
from stages.scoring.stage import ScoringConfig
from stages.stage import STAGES


def noise(count: int, seed: int = 0) -> list[list[int]]:
    """Responses whose ends and lengths say nothing."""
    draw = random.Random(seed)
    return [[draw.randrange(5, 15) for _ in range(draw.randint(3, 9))] for _ in range(count)]


def test_responses_of_one_kind_are_not_told_apart():
    ends = Ends.of(noise(400), noise(400, seed=1))
    shares = told_apart(ends)
    assert set(shares) == {"last_token", "first_token", "length"}
    assert all(0.35 < share < 0.65 for share in shares.values())
    assert causes(ends, shares) == {}


def test_rare_tokens_say_nothing():
    # Every token stands once: a count that included the pair itself would order all of them.
    ends = Ends.of([[i, 1000 + i] for i in range(50)], [[100 + i, 2000 + i] for i in range(50)])
    assert told_apart(ends) == {"last_token": 0.5, "first_token": 0.5, "length": 0.5}


def test_another_last_token_is_seen():
    ends = Ends.of([[*row, 1] for row in noise(40)], [[*row, 2] for row in noise(40, seed=1)])
    shares = told_apart(ends)
    assert shares["last_token"] == 1.0 and shares["first_token"] < LIMIT
    assert "end with the token 1, rejected ones with 2" in causes(ends, shares)["last_token"]


@pytest.mark.parametrize(
    ("cut", "setting"), [("rejected", "sampling.max_new_tokens"), ("chosen", "max_response_tokens")]
)
def test_responses_that_were_cut_are_seen(cut, setting):
    draw = random.Random(0)
    ended = [[*row, 1] for row in noise(60)]
    open_ended = [[*row, draw.randrange(100, 200)] for row in noise(60, seed=1)]
    ends = Ends.of(ended, open_ended) if cut == "rejected" else Ends.of(open_ended, ended)
    shares = told_apart(ends)
    assert shares["last_token"] > LIMIT
    assert setting in causes(ends, shares)["last_token"]


def test_first_token_and_length_are_seen():
    ends = Ends.of([[7, *row, *row] for row in noise(40)], [[8] for _ in range(40)])
    shares = told_apart(ends)
    assert shares["first_token"] == shares["length"] == 1.0
    lines = sentences(shares, causes(ends, shares))
    assert any("told apart by length alone in 100% of the pairs" in line and "length_matched" in line for line in lines)
    assert any("begin mostly with the token 7, rejected ones with 8" in line for line in lines)


def test_ties_count_half():
    ends = Ends.of([[1, 2]] * 30 + [[1, 2, 3]] * 10, [[1, 2]] * 40)
    assert told_apart(ends)["length"] == 0.5 + 10 / 40 / 2


def test_few_pairs_and_single_responses_say_nothing():
    assert told_apart(Ends.of(noise(FEWEST - 1), noise(FEWEST - 1))) == {}
    assert told_apart(Ends.of(noise(50), [[]] * 50)) == {}


def test_a_table_has_the_ends_of_its_rows():
    chosen, rejected = noise(30), [[], *noise(29, seed=2)]
    table = pa.table({"chosen_ids": chosen, "rejected_ids": rejected})
    table = pa.concat_tables([table.slice(0, 11), table.slice(11)])
    for left, right in zip(Ends.of(chosen, rejected), Ends.of_table(table), strict=True):
        assert np.array_equal(left, right) and len(left) == 29


def test_the_stage_records_it_and_says_it(store, make_prompts, make_rows, tiny_model, capsys):
    rows = make_rows(24)
    for row in rows:
        row["chosen"], row["rejected"] = f" {row['response']} And more of it.", row["response"]
    inputs = {"prompts": make_prompts(store, rows), "policy": external_model(tiny_model)}
    config = ScoringConfig.model_validate({"pairing": "given", "runtime": {"prompts_per_shard": 12}})
    record = execute(STAGES["score"], config, inputs, store)
    assert record.metrics["told_apart/length"] == 1.0 and record.metrics["told_apart/last_token"] == 0.5
    assert "by length alone in 100%" in " ".join(record.facts["told_apart"])
    output = capsys.readouterr().out
    assert "shard 0: chosen and rejected can be told apart by length" in output and "shard 1: " in output
