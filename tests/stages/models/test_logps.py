"""The log-prob store: a pass is paid once, never found for another model, and damaged parts are made again.

Strategy: a scorer that counts its rows stands for the forward pass; the tiny model only gives the directory and its digest.
"""

import random
import shutil

import numpy as np
import pytest

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import external_model
from data_contracts.errors import ContractError
from stages.models.key_index import KeyIndex
from stages.models.logps import Pass, row_key
from stages.models.policy import load_causal_lm, score_responses

PROMPTS, RESPONSES = [[1, 2], [3], [4, 5, 6]], [[7], [8, 9], [1, 1, 1]]


class Counting:
    """Gives every token the value of its id / 10, and counts the rows it was asked for."""

    def __init__(self):
        self.rows = 0

    def __call__(self, model, prompts, responses, budget):
        self.rows += len(prompts)
        return [np.asarray(response, dtype=np.float32) / 10 for response in responses]


@pytest.fixture
def make_pass(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(Pass, "_load", lambda self: None)

    def make(score, model: ArtifactRef | None = None, dtype: str = "float32"):
        return Pass(tmp_path, model or external_model(tiny_model), dtype, "cpu", 64, score=score)

    return make


def test_a_row_is_computed_once_and_read_in_the_order_asked_for(make_pass):
    score = Counting()
    one = make_pass(score)
    assert one.fill(PROMPTS, RESPONSES) == 3 and one.fill(PROMPTS[::-1], RESPONSES[::-1]) == 0
    assert [row.tolist() for row in one.get(PROMPTS[::-1], RESPONSES[::-1])] == [
        pytest.approx([0.1] * 3),
        pytest.approx([0.8, 0.9]),
        pytest.approx([0.7]),
    ]
    assert (score.rows, one.misses, one.hits) == (3, 3, 3)


def test_what_another_process_or_role_wrote_meanwhile_is_found(make_pass):
    first, second = make_pass(Counting()), make_pass(score := Counting())  # both opened on an empty store
    first.fill(PROMPTS, RESPONSES)
    assert second.fill(PROMPTS, RESPONSES) == 0 and score.rows == 0


def test_growing_data_pays_for_the_new_rows_only(make_pass):
    score = Counting()
    make_pass(score).fill(PROMPTS[:2], RESPONSES[:2])
    assert make_pass(score).fill(PROMPTS, RESPONSES) == 1 and score.rows == 3


def test_a_changed_model_or_dtype_never_hits(make_pass, tiny_model, tmp_path):
    score = Counting()
    make_pass(score).fill(PROMPTS, RESPONSES)
    changed = shutil.copytree(tiny_model, tmp_path / "changed")
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    assert make_pass(score, external_model(changed)).fill(PROMPTS, RESPONSES) == 3
    assert make_pass(score, dtype="bfloat16").fill(PROMPTS, RESPONSES) == 3
    moved = shutil.copytree(tiny_model, tmp_path / "moved")  # the same model elsewhere is the same model
    assert make_pass(score, external_model(moved)).fill(PROMPTS, RESPONSES) == 0


def test_the_seam_between_prompt_and_response_counts():
    assert row_key([1, 2], [3]) != row_key([1], [2, 3]) and row_key([1], [2]) == row_key((1,), (2,))


def test_a_damaged_part_is_computed_again(make_pass):
    score = Counting()
    one = make_pass(score)
    one.fill(PROMPTS, RESPONSES)
    (part,) = one.directory.glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:20])
    again = make_pass(score)
    assert again.fill(PROMPTS, RESPONSES) == 3 and again.get(PROMPTS[:1], RESPONSES[:1])[0] == pytest.approx([0.7])


def test_tokens_beyond_the_models_context_are_nan(make_pass, tiny_model):
    long = [5] * 300  # the tiny model has 256 positions
    one = make_pass(Counting())
    one.fill([[1] * 10], [long])
    (row,) = one.get([[1] * 10], [long])
    assert np.isfinite(row[:246]).all() and np.isnan(row[246:]).all()


def test_nan_log_probs_stop_the_pass_and_nothing_is_stored(make_pass):
    broken = make_pass(
        lambda model, prompts, responses, budget: [
            np.full(len(response), np.nan, dtype=np.float32) for response in responses
        ]
    )
    with pytest.raises(ContractError, match="NaN or infinity"):
        broken.fill(PROMPTS, RESPONSES)
    assert not list(broken.directory.glob("part-*"))


def test_an_index_of_keys_keeps_the_first_number_of_each(monkeypatch):
    """Before and after keys are sorted in, and where two keys share their first half."""
    monkeypatch.setattr("stages.models.key_index.UNSORTED", 3)
    chance, index, expected = random.Random(0), KeyIndex(), {}
    keys = [bytes([chance.randrange(4)]) * 8 + bytes([number % 50]) * 8 for number in range(200)]
    for start in range(0, 200, 2):
        part = keys[start : start + 2]
        index.add(part, [start, start + 1])
        for number, key in enumerate(part, start):
            expected.setdefault(key, number)
        assert index.find([*keys, b"\xff" * 16]) == [expected.get(key, -1) for key in keys] + [-1]
    assert len(index) == len(expected) and index.find([]) == []


def test_bf16_rows_of_the_two_layouts_lie_apart_and_float32_rows_together(tiny_model, tmp_path):
    model = external_model(tiny_model)
    packed, padded = (Pass(tmp_path, model, "bfloat16", "cpu", 64, packing=packing) for packing in (True, False))
    assert packed.directory != padded.directory and "padded" in padded.directory.name
    exact = [Pass(tmp_path, model, "float32", "cpu", 64, packing=packing) for packing in (True, False)]
    assert exact[0].directory == exact[1].directory
    prompts, responses = [[5, 6, 7], [5, 6, 7]], [[8, 9, 10, 11], [12, 13]]
    for model_pass in (padded, exact[1]):
        model_pass.fill(prompts, responses)
    network = load_causal_lm(str(tiny_model), "bfloat16", "cpu").eval()
    expected = score_responses(network, prompts, responses, 64, packing=False)
    assert all(map(np.array_equal, padded.get(prompts, responses), expected))
