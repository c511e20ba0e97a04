"""Which rows are trained on when: a plan of the seed and the data alone, cut into micro-batches that lose nothing.

Strategy: properties over many sizes; the layout of one small batch by hand.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ContractError
from stages.methods import METHODS
from stages.training.batches import (
    MARGIN_AT_STEP_1,
    METRICS,
    collate_rows,
    column,
    micro_batches,
    plan_steps,
    row_length,
)
from stages.training.config import TrainingConfig
from stages.training.stage import check_rows, check_rows_trained, key_additions, warn_of_first_margin


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_takes_every_row_once(num_rows, batch_size, epochs, seed):
    steps = plan_steps(num_rows, batch_size, epochs, seed)
    assert [step.number for step in steps] == list(range(len(steps)))
    for epoch in range(epochs):
        mine = [step for step in steps if step.epoch == epoch]
        assert sorted(row for step in mine for row in step.rows) == list(range(num_rows))
        assert all(len(step.rows) == batch_size for step in mine[:-1]) and 1 <= len(mine[-1].rows) <= batch_size


def test_epochs_and_seeds_differ_in_order_and_a_longer_training_begins_like_a_shorter_one():
    steps = plan_steps(40, 8, 3, seed=0)
    epochs = [[row for step in steps if step.epoch == epoch for row in step.rows] for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    assert plan_steps(40, 8, 1, seed=0) == steps[:5] != plan_steps(40, 8, 1, seed=1)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 90), st.integers(1, 5), st.booleans())
def test_ranks_share_a_step_without_loss_and_in_equally_many_micro_batches(lengths, budget, world_size, packed):
    parts = [micro_batches(lengths, budget, rank, world_size, packed) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1 and parts[0]
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(len(lengths)))
    for batch in (batch for part in parts for batch in part):
        size = (
            sum(lengths[row] for row in batch)
            if packed
            else len(batch) * max(map(lengths.__getitem__, batch), default=0)
        )
        assert len(batch) <= 1 or size <= budget
    # A rank is without work only where there are fewer rows than ranks.
    idle = sum(not batch for part in parts for batch in part)
    assert idle == 0 or len(lengths) % world_size


def useful_share(rows: int, ranks: int, mean: int, budget: int, packed: bool) -> float:
    """Tokens computed per token that the slowest rank of each round could have computed, over 50 steps."""
    random = np.random.default_rng(0)
    useful = room = 0.0
    for _ in range(50):
        lengths = np.maximum(20, random.normal(mean, 0.35 * mean, rows)).astype(int).tolist()
        rounds = zip(*(micro_batches(lengths, budget, rank, ranks, packed) for rank in range(ranks)), strict=True)
        for batches in rounds:
            sums = [sum(lengths[row] for row in batch) for batch in batches]
            sizes = (
                sums if packed else [len(batch) * max(map(lengths.__getitem__, batch), default=0) for batch in batches]
            )
            useful, room = useful + sum(sums), room + ranks * max(sizes)
    return useful / room


@pytest.mark.parametrize(
    ("rows", "ranks", "mean", "budget"),
    [(64, 8, 850, 8192), (64, 8, 1000, 8192), (64, 8, 1100, 8192), (64, 8, 900, 4096), (64, 4, 600, 8192)],
    ids=str,
)
def test_ranks_are_busy_while_they_share_a_step(rows, ranks, mean, budget):
    # The presets of SPPO and TGDPO, and of 4 GPUs; one batch filled after the other left 0.58 to 0.89 of it.
    assert useful_share(rows, ranks, mean, budget, packed=True) > 0.95
    assert useful_share(rows, ranks, mean, budget, packed=False) > 0.8  # padding is the rest


def test_a_step_of_two_rows_occupies_two_ranks():
    # SWIFT's preset: a batch of two pairs on two GPUs.
    for packed in (True, False):
        assert sorted(micro_batches([1000, 1200], 8192, rank, 2, packed) for rank in range(2)) == [[[0]], [[1]]]
        assert [micro_batches([1000], 8192, rank, 2, packed) for rank in range(2)] == [[[0]], [[]]]


def test_one_rank_fills_its_micro_batches_as_before():
    assert micro_batches([10] * 8, 60, 0, 1, packed=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert micro_batches([3, 10, 4, 4, 1], 12, 0, 1) == [[1], [2, 3, 0], [4]]


ROWS = [
    {
        "prompt_ids": [1, 2],
        "chosen_ids": [3],
        "rejected_ids": [4, 5],
        "chosen_weights": [0.5],
        "chosen_old_logps": None,
    },
    {
        "prompt_ids": [6],
        "chosen_ids": [7, 8, 9],
        "rejected_ids": [10],
        "chosen_weights": [1.0, 2.0, 3.0],
        "chosen_old_logps": None,
    },
]


def test_a_batch_holds_the_chosen_responses_first():
    batch = collate_rows(ROWS, ("chosen", "rejected"))
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [6, 7, 8, 9], [1, 2, 4, 5], [6, 10, 0, 0]]
    assert collate_rows(ROWS, ("chosen",)).input_ids.tolist() == batch.input_ids.tolist()[:2]
    assert [row_length(row, ("chosen", "rejected")) for row in ROWS] == [8, 8]
    assert [row_length(row, ("chosen",)) for row in ROWS] == [3, 4]


def test_a_column_is_padded_behind_its_tokens_or_absent():
    assert torch.equal(column(ROWS, "chosen_weights", 3), torch.tensor([[0.5, 0, 0], [1, 2, 3]]))
    assert column(ROWS, "chosen_old_logps", 3) is None


# --- rows that break their promise


def good(**changes):
    row = {"pair_id": "p7/0-1", "chosen_ids": [3, 4], "rejected_ids": [5]}
    row |= {
        "chosen_weights": [1.0, 1.0],
        "rejected_weights": [1.0],
        "chosen_reference_logps": [-1.0, -2.0],
        "rejected_reference_logps": [-1.0],
    }
    return row | {"chosen_old_logps": None, "rejected_old_logps": None} | changes


def test_rows_that_keep_the_contract_pass():
    check_rows([good(), good()], METHODS.config("sppo"))


@pytest.mark.parametrize(
    "name", ["chosen_weights", "rejected_weights", "chosen_reference_logps", "rejected_reference_logps"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named_by_row_and_column(name, bad):
    row = good()
    row[name] = [*row[name][:-1], bad]
    with pytest.raises(ContractError, match=rf"weighted_pairs row 1 \(pair_id p7/0-1\): {name} holds NaN or infinity"):
        check_rows([good(), row], METHODS.config("sppo"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen_weights": [1.0]}, "chosen_weights has 1 values for 2 tokens"),
        ({"rejected_reference_logps": [-1.0, -1.0]}, "rejected_reference_logps has 2 values for 1 tokens"),
        ({"chosen_reference_logps": None}, "chosen_reference_logps has 0 values for 2 tokens"),
        (
            {"rejected_ids": [], "rejected_weights": [], "rejected_reference_logps": []},
            "rejected_weights has 0 values for 0 tokens",
        ),
    ],
)
def test_a_column_of_another_length_is_named_by_row_and_column(changes, message):
    with pytest.raises(
        ContractError, match=rf"weighted_pairs row 1 \(pair_id p7/0-1\): {message}.*python -m stages weigh"
    ):
        check_rows([good(), good(**changes)], METHODS.config("sppo"))


def test_a_method_without_a_reference_asks_for_none_and_one_on_single_responses_for_no_rejected():
    check_rows([good(chosen_reference_logps=None, rejected_reference_logps=None)], METHODS.config("simpo"))
    check_rows(
        [good(chosen_reference_logps=None, rejected_ids=[], rejected_weights=[], rejected_reference_logps=None)],
        METHODS.config("sft"),
    )


def test_no_rows_are_nothing_to_train_on():
    with pytest.raises(ContractError, match="no rows to train on"):
        check_rows([], METHODS.config("sppo"))


def test_a_training_that_cannot_move_is_refused():
    still = good(chosen_weights=[0.0] * len(good()["chosen_ids"]), rejected_weights=[0.0] * len(good()["rejected_ids"]))
    check_rows([still, good()], METHODS.config("sppo"))
    with pytest.raises(ContractError, match="the weight of every token of all 2 rows is 0, so no update would move"):
        check_rows([still, still], METHODS.config("sppo"))


def test_the_key_tells_the_rule_of_the_warm_up_apart_where_there_is_one():
    assert key_additions(TrainingConfig(warmup_ratio=0), {}) == {}
    assert key_additions(TrainingConfig(), {}) == {"warmup": "first update moves"}


# --- every row is trained on


def lines_of(tmp_path, config: TrainingConfig, count: int, spoil=lambda lines: lines) -> TrainingConfig:
    """metrics.jsonl as a training of `count` rows leaves it."""
    steps = plan_steps(count, config.batch_size, config.epochs, config.seed)
    lines = [{"step": step.number + 1, "epoch": step.epoch, "rows": float(len(step.rows))} for step in steps]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in spoil(lines)))
    return config


def test_a_record_counts_the_rows_that_were_given_and_trained_on(tmp_path):
    config = lines_of(tmp_path, TrainingConfig(batch_size=4, epochs=2), 10)
    assert check_rows_trained(tmp_path, 10, config) == {"rows_in": 10, "rows_trained": 10}
    lines_of(tmp_path, config, 10, lambda lines: [{"step": line["step"], "epoch": line["epoch"]} for line in lines])
    assert check_rows_trained(tmp_path, 10, config) == {"rows_in": 10, "rows_trained": 10}
    for spoil in (
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[0]],
        lambda lines: [lines[0] | {"rows": 3}, *lines[1:]],
    ):
        lines_of(tmp_path, config, 10, spoil)
        with pytest.raises(ContractError, match=r"epoch \d trained on \d+(\.0)? of 10 rows"):
            check_rows_trained(tmp_path, 10, config)


@pytest.mark.parametrize("method", METHODS.names())
def test_a_response_that_the_method_would_not_read_is_an_error(method):
    """Rows of pairs and of single responses, by every method: read whole, or refused."""
    config = METHODS.config(method)
    columns = ("weights", "reference_logps", "old_logps")
    chosen = {"pair_id": "q", "chosen_ids": [3, 1]} | {f"chosen_{name}": [1.0, 1.0] for name in columns}
    pair = chosen | {"rejected_ids": [4, 1]} | {f"rejected_{name}": [1.0, 1.0] for name in columns}
    single = chosen | {"rejected_ids": []} | {f"rejected_{name}": [] for name in columns}
    sides = METHODS.get(method).sides(config)
    whole, other = (pair, single) if len(sides) == 2 else (single, pair)
    check_rows([whole], config)
    with pytest.raises(
        ContractError, match="does not read" if len(sides) == 1 else "0 values for 0 tokens|for 0 tokens"
    ):
        check_rows([whole, other], config)
    if len(sides) == 1:  # the contrastive models of TIS-DPO (S)
        check_rows([whole, other], config, may_leave_a_side=True)


def test_a_margin_before_the_first_update_is_said_where_policy_and_reference_are_one_model(store, make_artifact):
    model = ArtifactRef(kind="checkpoint", key="external", path="/m", content="one")
    pairs = make_artifact(store, "weighted_pairs", [])
    record = store.load("weighted_pairs", pairs.key)
    store.sign(record.model_copy(update={"inputs": {"reference": model}}))
    for margin, policy, is_said in ((0.4, model, True), (0.05, model, False), (0.4, pairs, False)):
        lines: list[str] = []
        job = SimpleNamespace(
            config=TrainingConfig(), store_root=store.root, inputs={"pairs": pairs, "policy": policy}, facts={}, log=lines.append
        )  # fmt: skip
        warn_of_first_margin(job, {MARGIN_AT_STEP_1: margin})
        assert bool(lines) is is_said and ("first_margin" in job.facts) is is_said
    assert TrainingConfig().runtime.max_first_margin < 0.4
