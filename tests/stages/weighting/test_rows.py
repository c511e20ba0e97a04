"""The rows of the weigh stage: which responses there are, what a swap exchanges, and what the trainer's row holds."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data_contracts.errors import ContractError
from data_contracts.rows import ScoredPairRow
from data_contracts.shards import shard_path, to_table, write_shard
from stages.weighting.rows import TeacherIds, TokenNumbers, is_identical, responses_of, swapped, weighted_pair
from stages.weighting.stage import _summary


def scored(**changes) -> ScoredPairRow:
    row: ScoredPairRow = {
        "pair_id": "p0/1-2",
        "prompt_id": "p0",
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4],
        "rejected_ids": [5],
        "chosen": "yes",
        "rejected": "no",
        "score_chosen": 2.0,
        "score_rejected": -1.0,
        "win_rate_chosen": 0.9,
        "win_rate_rejected": 0.2,
        "chosen_candidate": 1,
        "rejected_candidate": 2,
        "group_scores": [0.0, 2.0, -1.0],
        "group_win_rates": [0.4, 0.9, 0.2],
        "scorer": "length",
    }
    return row | changes


def numbers(*values: float) -> TokenNumbers:
    return TokenNumbers(np.array(values, dtype=np.float32), -np.array(values, dtype=np.float32), None)


def test_chosen_responses_come_first_and_empty_ones_are_left_out():
    pairs = [scored(), scored(rejected_ids=[]), scored(rejected_ids=[7, 8])]
    listed = [(response.number, response.side, response.ids) for response in responses_of(pairs)]
    assert listed == [
        (0, "chosen", [3, 4]),
        (1, "chosen", [3, 4]),
        (2, "chosen", [3, 4]),
        (0, "rejected", [5]),
        (2, "rejected", [7, 8]),
    ]


def test_a_swap_exchanges_the_responses_and_leaves_win_rates_with_their_labels():
    pair = scored()
    other = swapped(pair)
    assert (other["chosen_ids"], other["rejected_ids"], other["chosen"], other["rejected"]) == (
        [5],
        [3, 4],
        "no",
        "yes",
    )
    assert (other["score_chosen"], other["chosen_candidate"], other["win_rate_chosen"]) == (-1.0, 2, 0.9)
    assert swapped(other) == pair and pair == scored()


def test_a_weighted_pair_fits_its_schema_with_and_without_a_rejected_response():
    both = weighted_pair(scored(), numbers(1, 2), numbers(3), TeacherIds([9], [8, 7]))
    single = weighted_pair(
        scored(rejected_ids=[]), numbers(1, 2), TokenNumbers.of_no_tokens(True, has_old_policy=False), None
    )
    table = to_table([both, single], "weighted_pairs").to_pydict()
    assert table["chosen_weights"] == [[1.0, 2.0]] * 2 and table["chosen_reference_logps"] == [[-1.0, -2.0]] * 2
    assert table["rejected_weights"] == [[3.0], []] and table["rejected_reference_logps"] == [[-3.0], []]
    assert table["chosen_old_logps"] == table["rejected_old_logps"] == [None, None]
    assert table["teacher_prompt_ids"] == [[9], None] and table["teacher_ids"] == [[8, 7], None]


def test_a_pair_is_identical_only_with_equal_tokens_and_equal_weights():
    pair = scored(rejected_ids=[3, 4])
    assert is_identical(weighted_pair(pair, numbers(1, 2), numbers(1, 2), None))
    assert not is_identical(weighted_pair(pair, numbers(1, 2), numbers(1, 3), None))
    assert not is_identical(weighted_pair(scored(), numbers(1, 2), numbers(1), None))


def test_a_pair_that_is_neither_weighted_nor_dropped_is_an_error(tmp_path):
    sources = SimpleNamespace(cache_counts=dict)
    rows = [weighted_pair(scored(pair_id=f"p{i}/1-2"), numbers(1, 1), numbers(1), None) for i in "01"]
    write_shard(shard_path(tmp_path, 0), to_table(rows, "weighted_pairs"))
    dropped = [{"prompt_id": "p2", "reason": "chosen and rejected are the same"}]
    write_shard(shard_path(tmp_path, 0, "dropped"), to_table(dropped, "dropped"))
    metrics = _summary(tmp_path, sources, 3)
    assert (metrics["rows_in"], metrics["pairs"], metrics["dropped"]) == (3, 2, 1)
    with pytest.raises(ContractError, match="of 4 scored pairs 2 were weighted and 1 dropped: the others are lost"):
        _summary(tmp_path, sources, 4)
