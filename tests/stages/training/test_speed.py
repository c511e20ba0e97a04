"""Tokens per second and MFU of a training, by hand; no MFU without a GPU whose peak is known."""

import pytest

from stages.job import Job
from stages.running.cost import SPEED_EVENT, MemoryWatch, cost_of, parameters
from stages.running.history import events
from stages.stage import STAGES
from stages.training.speed import Speed, mean_speed, sequence_tokens


def test_every_response_counts_with_its_prompt():
    rows = [
        {"prompt_ids": [1] * 5, "chosen_ids": [1] * 3, "rejected_ids": [1] * 2},
        {"prompt_ids": [1] * 4, "chosen_ids": [1], "rejected_ids": []},
    ]
    assert sequence_tokens(rows, ("chosen", "rejected")) == 8 + 7 + 5
    assert sequence_tokens(rows, ("chosen",)) == 8 + 5


@pytest.mark.parametrize(
    ("device", "dtype", "name", "peak"),
    [
        ("cuda", "bfloat16", "NVIDIA H100 80GB HBM3", 989e12),
        ("cuda", "float32", "NVIDIA H100 80GB HBM3", None),
        ("cuda", "bfloat16", "an unknown card", None),
        ("cpu", "bfloat16", "", None),
    ],
)
def test_mfu_is_the_part_of_the_peak_of_all_gpus(tiny_model, monkeypatch, device, dtype, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    speed = Speed(str(tiny_model), dtype, device, 2).of(1000, 4.0)
    assert speed["tokens_per_second"] == 250
    if peak is None:
        assert "mfu" not in speed
    else:
        assert speed["mfu"] == pytest.approx(6 * parameters(str(tiny_model)) * 250 / (2 * peak))


def test_long_steps_count_more():
    steps = [
        {"seconds": 1.0, "tokens_per_second": 100.0, "mfu": 0.5},
        {"seconds": 3.0, "tokens_per_second": 20.0, "mfu": 0.1},
        {"seconds": 9.0},  # a line of an older version, from before a kill
    ]
    assert mean_speed(steps) == {"tokens_per_second": 40.0, "mfu": pytest.approx(0.2)}
    assert mean_speed([{"seconds": 0.0}]) == {}


def test_the_speed_is_among_the_costs(tmp_path):
    job = Job(STAGES["train"], None, {}, tmp_path)
    job.event(SPEED_EVENT, speed={"tokens_per_second": 1.0})  # of a try before
    job.event(SPEED_EVENT, speed={"tokens_per_second": 40.0, "mfu": 0.2})
    cost = cost_of(events(tmp_path), MemoryWatch())
    assert cost["tokens_per_second"] == 40 and cost["mfu"] == 0.2
