"""The fused update on GPUs is torch's own RMSprop: the same weights, the same state, also after a change between them.

Strategy: Adam's fused kernel runs on the CPU too, so both take the same random steps there.
"""

from copy import deepcopy

import pytest
import torch
from transformers import get_scheduler

from stages.training.config import TrainingConfig
from stages.training.engine import deepspeed_settings, set_part
from stages.training.optimizer import FusedRMSprop, make_optimizer, make_schedule

SHAPES = [(33, 7), (5,), (64, 64)]


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def take_steps(parameters, optimizer, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0**-number
        parameters[1].grad = None if step == 1 else parameters[1].grad  # a weight without a gradient stays
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_fused_update_is_rmsprop(decay):
    plain, fused = weights(), weights()
    reference = torch.optim.RMSprop(plain, lr=1e-2, weight_decay=decay)
    optimizer = FusedRMSprop(fused, lr=1e-2, weight_decay=decay)
    take_steps(plain, reference, range(6))
    take_steps(fused, optimizer, range(6))
    for left, right in zip(plain, fused, strict=True):
        assert torch.allclose(left, right, rtol=1e-6, atol=1e-7)
    for left, right in zip(reference.state.values(), optimizer.state.values(), strict=True):
        assert left.keys() == right.keys() and left["step"] == right["step"]
        assert torch.allclose(left["square_avg"], right["square_avg"], rtol=1e-6)


def test_a_state_of_one_is_a_state_of_the_other():
    plain, fused = weights(), weights()
    reference, optimizer = torch.optim.RMSprop(plain, lr=1e-2), FusedRMSprop(fused, lr=1e-2)
    take_steps(plain, reference, range(3))
    optimizer.load_state_dict(deepcopy(reference.state_dict()))
    for left, right in zip(plain, fused, strict=True):
        right.data.copy_(left)
    take_steps(plain, reference, range(3, 6))
    take_steps(fused, optimizer, range(3, 6))
    assert all(torch.allclose(left, right, rtol=1e-6, atol=1e-7) for left, right in zip(plain, fused, strict=True))


@pytest.mark.parametrize(
    ("name", "device", "kind"),
    [
        ("rmsprop", "cpu", torch.optim.RMSprop),
        ("rmsprop", "cuda", FusedRMSprop),
        ("adamw", "cpu", torch.optim.AdamW),
        ("adamw", "cuda", torch.optim.AdamW),
    ],
)
def test_gpus_take_fused_kernels_and_the_cpu_what_it_took(name, device, kind):
    optimizer = make_optimizer(TrainingConfig(optimizer=name, weight_decay=0.1), weights(), device)
    assert type(optimizer) is kind and optimizer.defaults["weight_decay"] == 0.1
    assert name == "rmsprop" or optimizer.defaults["fused"]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_zero_adds_gradients_up_in_float32_and_gpus_reduce_them_meanwhile(stage, dtype, device):
    config = TrainingConfig(dtype=dtype, runtime={"zero_stage": stage})
    settings = deepspeed_settings(config, device)
    accumulates_in_float32 = settings.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    assert accumulates_in_float32 == (stage > 0 and dtype == "bfloat16")
    assert settings["zero_optimization"].get("overlap_comm", False) == (stage > 0 and device == "cuda")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (1,)])
def test_every_rank_gets_its_part_of_a_tensor_of_any_size(ranks, shape):
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    size = -(-whole.numel() // ranks)  # DeepSpeed pads the last parts
    parts = [torch.zeros(size) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        set_part(part, whole, rank)
    together = torch.cat(parts)
    assert torch.equal(together[: whole.numel()], whole.flatten()) and not together[whole.numel() :].any()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("num_steps", "epochs", "spans"), [(20, 2, None), (9, 1, 3), (1, 1, None), (3, 1, None)])
def test_after_the_warm_up_the_rates_are_those_of_transformers_and_every_update_moves(
    schedule, num_steps, epochs, spans
):
    config = TrainingConfig(schedule=schedule, epochs=epochs, schedule_epochs=spans, warmup_ratio=0.2)
    planned = num_steps * (spans or epochs) // epochs
    warmup = round(0.2 * planned)
    ours, theirs = (make_optimizer(config, weights(), "cpu") for _ in range(2))
    our_schedule = make_schedule(config, ours, num_steps)
    their_schedule = get_scheduler(schedule, theirs, num_warmup_steps=warmup, num_training_steps=planned)
    for step in range(num_steps):
        rate = ours.param_groups[0]["lr"]
        expected = config.learning_rate * (step + 1) / warmup if step < warmup else theirs.param_groups[0]["lr"]
        assert rate == pytest.approx(expected, rel=1e-12) and rate > 0
        for optimizer, its_schedule in ((ours, our_schedule), (theirs, their_schedule)):
            optimizer.step()
            its_schedule.step()


def test_a_warm_up_of_so_many_updates_is_not_a_part_of_the_training():
    """As DPO's code and its forks warm up: 150 updates, then the peak, however long the training is."""
    config = TrainingConfig(schedule="constant_with_warmup", warmup_steps=4, warmup_ratio=0.5)
    for num_steps, expected in ((2, [0.25, 0.5]), (6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])):
        optimizer = make_optimizer(config, weights(), "cpu")
        schedule, rates = make_schedule(config, optimizer, num_steps), []
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"] / config.learning_rate)
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx(expected)
    assert "warmup_steps" not in TrainingConfig().identity()
