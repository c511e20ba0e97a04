"""The weight providers that need no alignment: values by hand, statistics, and what their settings do."""

from __future__ import annotations

import numpy as np
import pytest

from data_contracts.errors import ContractError
from stages.weighting.weights import WEIGHTS
from stages.weighting.weights.base import ResponseBatch, Tokens
from stages.weighting.weights.rounding import round_decimals


def responses(rows: dict[str, list[list[float]]], chosen: list[bool], keys: list[str] | None = None) -> ResponseBatch:
    lengths = [len(row) for row in next(iter(rows.values()))]
    tokens = Tokens.of([range(length) for length in lengths], None, [False] * len(lengths))
    logps = {role: np.array([value for row in values for value in row]) for role, values in rows.items()}
    return ResponseBatch(keys or [f"row{i}" for i in range(len(lengths))], np.array(chosen), tokens, logps)


def weights(name: str, batch: ResponseBatch, **settings):
    provider = WEIGHTS.get(name)
    return provider.weights(provider.Config(**settings), batch)


def test_tis_dpo_raises_what_the_good_model_prefers_in_chosen_and_what_the_bad_one_prefers_in_rejected():
    batch = responses(
        {"positive": [[-1.0, -2.0], [-1.0, -2.0]], "negative": [[-2.0, -1.8], [-2.0, -1.8]]}, [True, False]
    )
    result = weights("tis_dpo", batch)
    assert result.values.tolist() == pytest.approx([np.e, np.exp(-0.2), 1 / np.e, np.exp(0.2)])
    assert weights("contrastive", batch).values.tolist() == result.values.tolist()
    assert result.stats["at_L"] == (0.0, 4.0)


def test_tis_dpos_published_transforms():
    batch = responses({"positive": [[0.0, 0.0, 0.0], [0.0]], "negative": [[-0.126, 1.0, -9.0], [-1.0]]}, [True, True])
    # raw 0.13, -1, 9 and 1
    assert weights("tis_dpo", batch, transform="rank").values.tolist() == pytest.approx([1.0, 0.7, 1.3, 1.0])
    # (x + 1.5) / 3 * 0.6 + 0.7, clipped
    assert weights("tis_dpo", batch, transform="threshold_scale").values.tolist() == pytest.approx(
        [1.026, 0.8, 1.3, 1.2]
    )


def test_the_eos_takes_no_rank_unless_it_is_asked_to():
    tokens = Tokens.of([[5, 6, 7], [1], [8, 9]], None, [True, True, False])
    good, bad = np.array([0.5, 0.1, 3.0, 2.0, 0.2, 0.1]), np.zeros(6)
    batch = ResponseBatch(["a", "b", "c"], np.ones(3, dtype=bool), tokens, {"positive": good, "negative": bad})
    result = weights("tis_dpo", batch, transform="rank").values.tolist()
    assert result == pytest.approx([1.3, 0.7, 0.0, 0.0, 1.3, 0.7])
    result = weights("tis_dpo", batch, transform="rank", eos="ranked").values.tolist()
    assert result == pytest.approx([1.0, 0.7, 1.3, 1.0, 1.3, 0.7])
    result = weights("tis_dpo", batch, transform="threshold_scale").values.tolist()
    assert result == pytest.approx([1.1, 1.02, 0.0, 0.0, 1.04, 1.02])
    config = WEIGHTS.get("tis_dpo").Config
    assert "eos" not in config().identity() and config(transform="rank").identity()["eos"] == "zero"


def test_tgdpo_token_rewards_of_both_kinds():
    batch = responses(
        {"reward_model": [[-1.0, -3.0], [-1.0, -3.0]], "reference": [[-2.0, -1.0], [-2.0, -1.0]]}, [True, False]
    )
    assert weights("tgdpo", batch, alpha=0.5, beta_r=1.0).values.tolist() == pytest.approx([1.5, 0.0, 0.5, 2.0])
    assert weights("tgdpo", batch, alpha=0.5, beta_r=1.0, kind="simpo").values.tolist() == pytest.approx(
        [0.75, 0.25, 1.25, 1.75]
    )
    assert weights("tgdpo", batch, alpha=0.0).values.tolist() == [1.0] * 4
    result = weights("tgdpo", batch, alpha=1.0, beta_r=1.0, floor=0.1)
    assert result.values.tolist() == pytest.approx([2.0, 0.1, 0.1, 3.0])
    assert result.stats["nonpositive"] == (2.0, 4.0) and result.stats["min/weight"] == (-1.0, 4.0)
    provider = WEIGHTS.get("tgdpo")
    assert provider.needs(provider.Config(kind="simpo")) == {"reward_model"}


def test_a_reward_model_of_another_tokenizer_is_seen_by_its_length():
    batch = responses({"reward_model": [[-1.0, -3.0]], "reference": [[-2.0, -1.0]]}, [True])
    batch.logps["reward_model"] = np.zeros(3)
    with pytest.raises(ContractError, match="'reward_model': 3 values for 2 tokens"):
        weights("tgdpo", batch)


def test_tidpo_importance_by_row():
    batch = responses({"importance": [[1.0, 3.0, 0.0], [5.0], [2.0, 2.0]]}, [True, True, False])
    result = weights("tidpo", batch)
    assert result.values.tolist() == pytest.approx([1 / 3, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert result.stats["degenerate"] == (2.0, 3.0)


def test_random_weights_depend_on_seed_and_row_alone():
    rows = {"reference": [[0.0] * 5, [0.0] * 3]}
    both = weights("random", responses(rows, [True, False], ["a", "b"])).values
    alone = weights("random", responses({"reference": [[0.0] * 3]}, [True], ["b"])).values
    assert np.array_equal(both[5:], alone) and (both >= -0.5).all() and (both <= 1.5).all()
    assert not np.array_equal(weights("random", responses(rows, [True, False], ["a", "b"]), seed=1).values, both)
    unit = weights("random", responses({"reference": [[0.0] * 1000]}, [True]), low=0.0, high=1.0)
    assert 0.45 < unit.values.mean() < 0.55 and unit.stats["nonpositive"][0] == 0.0


def test_reverse_and_noise_change_another_providers_weights():
    batch = responses({"positive": [[-1.0, -2.0]], "negative": [[-2.0, -1.8]]}, [True])
    inner = weights("tis_dpo", batch).values
    assert np.allclose(weights("reverse", batch, of={"name": "tis_dpo"}).values, 1 - inner)
    blurred = weights("noise", batch, of={"name": "tis_dpo"}, amplitude=0.2)
    assert (np.abs(blurred.values - inner) <= 0.2).all() and not np.array_equal(blurred.values, inner)
    assert blurred.stats["mean"][0] == pytest.approx(blurred.values.sum())
    provider = WEIGHTS.get("reverse")
    assert provider.needs(provider.Config(of={"name": "tgdpo", "kind": "simpo"})) == {"reward_model"}
    assert WEIGHTS.config({"name": "reverse", "of": {"name": "tis_dpo", "k": 2.0}}).of.k == 2.0


def test_ones_and_equal():
    batch = responses({"reference": [[-1.0, -2.0], []]}, [True, False])
    assert weights("ones", batch).values.tolist() == [1.0, 1.0]
    result = weights("equal", batch, value=2.5)
    assert [row.tolist() for row in result.per_response(batch.student)] == [[2.5, 2.5], []]
    assert result.stats["mean"] == (5.0, 2.0)


def test_the_released_weights_end_in_zero_and_sum_to_a_hundred():
    tokens = Tokens.of([[1, 2, 3], [4]], None, [True, False])
    teacher = np.array([-7.0, -15.0, -1.0, -9.0])
    batch = ResponseBatch(["a", "b"], np.ones(2, dtype=bool), tokens, {}, None, tokens, teacher)
    # 2 (1 - 0/15) - 0.5 = 1.5 and 2 (1 - 8/15) - 0.5 = 0.43 after rounding; the EOS gets 0
    assert weights("swift_released", batch, normalise="none").values.tolist() == pytest.approx([1.5, 0.43, 0.0, 1.23])
    assert weights("swift_released", batch).values.tolist() == pytest.approx([150 / 1.93, 43 / 1.93, 0.0, 100.0])


def test_the_released_scores_are_rounded_before_the_affine_map_too():
    tokens = Tokens.of([[1, 2]], None, [False])
    teacher = np.array([-7.0361, -9.8])
    batch = ResponseBatch(["a"], np.ones(1, dtype=bool), tokens, {}, None, tokens, teacher)
    # 7.0361 is stored as 7.04: 2 (1 - 0.04/15) - 0.5 = 1.4947; of 7.0361 itself it would be 1.4952, and 1.5
    assert weights("swift_released", batch, normalise="none").values.tolist() == pytest.approx([1.49, 1.13])


def test_decimals_are_rounded_as_python_does():
    values = np.array([2.675, 0.125, 0.135, -2.675, 1.005, 0.285, 1e9 + 0.5, 3.14159])
    assert round_decimals(values, 2).tolist() == [round(value, 2) for value in values.tolist()]
    draws = np.random.default_rng(0).integers(-(10**6), 10**6, 20000) / 1000
    assert round_decimals(draws, 2).tolist() == [round(value, 2) for value in draws.tolist()]


def test_empty_batches_give_empty_weights():
    batch = responses(
        {
            "reference": [[], []],
            "positive": [[], []],
            "negative": [[], []],
            "reward_model": [[], []],
            "importance": [[], []],
        },
        [True, False],
    )
    for name in ("ones", "tis_dpo", "tgdpo", "tidpo", "random"):
        assert weights(name, batch).values.shape == (0,)
