"""Training: the numbers are those of a plain torch loop, however the work is cut up, dealt out or interrupted.

Strategy: 22 random pairs under the tiny model, with weights that are not one and a reference that is not the policy, in float32. The
reference is a loop without DeepSpeed, batches or padding. One process runs all the single-rank variants (starting DeepSpeed is most of
the cost); two ranks and a kill in mid-epoch go through the real command.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_contracts.checkpoint import check_model_directory, external_model
from data_contracts.shards import SCHEMAS
from data_contracts.store import Store
from stages.models.policy import load_causal_lm, score_responses
from stages.running.history import events
from stages.stage import STAGES
from stages.training.batches import plan_steps
from stages.training.config import TrainingConfig
from stages.training.loop import SaveClock
from stages.training.resume import sealed

ROOT = Path(__file__).resolve().parents[3]
NUM_PAIRS = 22
ETA, BETA = 5.0, 0.5
BASE = {
    "method": {"name": "sppo", "eta": ETA}, "learning_rate": 1e-4, "epochs": 2, "batch_size": 5, "optimizer": "rmsprop", "schedule": "linear",
    "warmup_ratio": 0.25, "max_grad_norm": 1.0, "dtype": "float32", "seed": 3, "runtime": {"device": "cpu"},
}  # fmt: skip
DPO = {
    "method": {"name": "dpo", "beta": BETA},
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
}
VARIANTS = {
    "base": {},
    "one pair at a time": {"runtime": {"batch_tokens": 1}},
    "padded": {"runtime": {"packing": False}},
    "activations recomputed": {"runtime": {"gradient_checkpointing": True}},
    "zero 1": {"runtime": {"zero_stage": 1}},
    "zero 2": {"runtime": {"zero_stage": 2, "batch_tokens": 100}},
    "zero 3": {"runtime": {"zero_stage": 3, "batch_tokens": 100}},
    "without logits": {"runtime": {"batch_tokens": 60}},
    "without logits, zero 3": {"runtime": {"zero_stage": 3, "gradient_checkpointing": True}},
    "dpo": DPO,
    "bf16": {"dtype": "bfloat16"},
    **{f"bf16, zero {stage}": {"dtype": "bfloat16", "runtime": {"zero_stage": stage}} for stage in (1, 2)},
    "bf16, one pair at a time": {"dtype": "bfloat16", "runtime": {"batch_tokens": 1}},
    **{
        f"bf16, zero {stage}, no step": {
            "dtype": "bfloat16",
            "learning_rate": 1e-30,
            "epochs": 1,
            "runtime": {"zero_stage": stage},
        }
        for stage in range(4)
    },
    "bf16, adamw": {
        "dtype": "bfloat16",
        "optimizer": "adamw",
        "epochs": 1,
        "batch_size": 22,
        "schedule": "constant_with_warmup",
        "warmup_ratio": 0,
    },
    "saved in bf16": {"save_dtype": "bfloat16"},
    "short of its schedule": {"epochs": 1, "schedule_epochs": 2},
    "saved all the time": {"runtime": {"save_every_seconds": 0}},
    "diverged": {"policy": "broken"},
}


def config(**changes) -> dict:
    return BASE | changes | {"runtime": BASE["runtime"] | changes.get("runtime", {})}


@pytest.fixture(scope="module")
def reference_model(tmp_path_factory, make_model):
    """Another model than the policy, or the first log-ratios would all be zero."""
    return make_model(tmp_path_factory.mktemp("models") / "reference", seed=1)


@pytest.fixture(scope="module")
def rows(reference_model) -> list[dict]:
    """Rows of weighted_pairs of very different lengths."""
    random = np.random.default_rng(0)
    model = load_causal_lm(str(reference_model), "float32", "cpu").eval()
    empty = dict.fromkeys(SCHEMAS["weighted_pairs"].names)
    rows = []
    for number in range(NUM_PAIRS):
        prompt, chosen, rejected = (random.integers(5, 320, random.integers(1, most)).tolist() for most in (14, 12, 9))
        logps = score_responses(model, [prompt] * 2, [chosen, rejected], 4096)
        rate = float(random.uniform(0.5, 0.9))
        row = empty | {
            "pair_id": f"p{number}/0-1",
            "prompt_id": f"p{number}",
            "prompt_ids": prompt,
            "win_rate_chosen": rate,
            "win_rate_rejected": 1 - rate,
        }
        for side, ids, values in (("chosen", chosen, logps[0]), ("rejected", rejected, logps[1])):
            row |= {f"{side}_ids": ids, f"{side}_reference_logps": values.tolist(), f"{side}_candidate": 0}
            row[f"{side}_weights"] = random.uniform(0.5, 1.5, len(ids)).astype(np.float32).tolist()
        rows.append(row)
    return rows


def plain_loop(
    model_directory, rows, settings, prepare=lambda model: None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of all steps and the final weights: one pair after the other, no padding, torch's own optimizers.

    prepare: what is done to the model before it is trained, e.g. an adapter put into it
    """
    settings = TrainingConfig.model_validate(settings)
    model = load_causal_lm(str(model_directory), "float32", "cpu").train()
    prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(trained, lr=settings.learning_rate)
    else:
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = plan_steps(len(rows), settings.batch_size, settings.epochs, settings.seed)
    planned = len(steps) * (settings.schedule_epochs or settings.epochs) // settings.epochs
    warm = round(settings.warmup_ratio * planned)
    losses, norms = [], []
    for step in steps:
        total = sum(_pair_loss(model, rows[i], settings.method.name) for i in step.rows) / len(step.rows)
        optimizer.zero_grad()
        total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))))
        left = (planned - step.number) / (planned - warm)
        decay = left if settings.schedule == "linear" else 0.5 * (1 + np.cos(np.pi * (1 - left)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (
            (step.number + 1) / warm if step.number < warm else decay
        )
        optimizer.step()
        losses.append(total.item())
    return losses, norms, {name: value.detach().clone() for name, value in model.named_parameters()}


def _pair_loss(model, row, method):
    ratios = []
    for side in ("chosen", "rejected"):
        prompt, ids = row["prompt_ids"], torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        logps = logits[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]]
        ratios.append(
            (torch.tensor(row[f"{side}_weights"]) * (logps - torch.tensor(row[f"{side}_reference_logps"]))).sum()
        )
    if method == "dpo":
        return torch.nn.functional.softplus(-BETA * (ratios[0] - ratios[1]))
    return (ratios[0] - ETA * (row["win_rate_chosen"] - 0.5)) ** 2 + (
        ratios[1] - ETA * (row["win_rate_rejected"] - 0.5)
    ) ** 2


# Every variant in one process. Closing an engine ends torch's process group, which cannot be opened again: it is left open here.
DRIVER = """
import json, sys, traceback
from pathlib import Path
from stages.training.engine import Engine
from stages.training.config import TrainingConfig, TrainingInputs
from stages.training.stage import train_rank
import stages.models.kernels
Engine.close = Engine.barrier
fuses = stages.models.kernels.fuses
for name, settings, inputs in json.load(open(sys.argv[1])):
    out = Path(sys.argv[2]) / name
    out.mkdir()
    stages.models.kernels.fuses = (lambda head, tokens: True) if name.startswith("without logits") else fuses
    try:
        train_rank(out, TrainingConfig.model_validate(settings), TrainingInputs(**inputs), None)
    except Exception:
        (out / "error").write_text(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_model):
    """The tiny model after a training that diverged."""
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "broken"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, broken, rows, make_artifact):
    """trained(variant) -> Trained, of a run of every variant."""
    root = tmp_path_factory.mktemp("variants")
    pairs = make_artifact(Store(root / "store"), "weighted_pairs", rows).path
    work = []
    for name, changes in VARIANTS.items():
        policy = broken if changes.get("policy") == "broken" else tiny_model
        inputs = {"pairs": pairs, "more_pairs": None, "policy": str(policy), "reference": None, "teacher": None}
        work.append((name, config(**{key: value for key, value in changes.items() if key != "policy"}), inputs))
    (root / "work.json").write_text(json.dumps(work))
    (root / "out").mkdir()
    command = [sys.executable, "-c", DRIVER, str(root / "work.json"), str(root / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    def find(name: str) -> Trained:
        out = root / "out" / name
        assert name == "diverged" or not (out / "error").exists(), (out / "error").read_text()
        return Trained(out, out / ".export")

    return find


class Trained:
    def __init__(self, out: Path, model: Path):
        self.out, self.model = out, model
        self.steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        self.losses = [step["loss"] for step in self.steps]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")


def gap(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


# --- the numbers


@pytest.mark.parametrize("name", ["base", "dpo", "short of its schedule"])
def test_losses_and_weights_are_those_of_a_plain_torch_loop(trained, tiny_model, rows, name):
    losses, norms, weights = plain_loop(tiny_model, rows, config(**VARIANTS[name]))
    run = trained(name)
    assert run.losses == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in run.steps] == pytest.approx(norms, rel=1e-4)
    assert gap(run.weights, weights) < 1e-5
    # What was learned is far more than that.
    assert gap(run.weights, load_file(tiny_model / "model.safetensors")) > 3e-4


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing(trained):
    # 10 steps, 2 of warm-up (round(2.5) = 2): 1/2, 1, 1, 7/8 ... 1/8
    rates = [step["learning_rate"] for step in trained("base").steps]
    assert rates == pytest.approx([0.5e-4, 1e-4] + [1e-4 * (10 - step) / 8 for step in range(2, 10)])
    assert trained("base").losses[0] == pytest.approx(trained("short of its schedule").losses[0], rel=1e-6)


def test_every_step_is_logged_with_its_rows_tokens_and_metrics(trained, rows):
    steps = trained("base").steps
    assert [(step["step"], step["epoch"]) for step in steps] == [(number + 1, number // 5) for number in range(10)]
    tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert sum(step["tokens"] for step in steps) == 2 * tokens
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "seconds"} <= steps[0].keys()


def test_the_loss_falls(trained):
    losses = trained("base").losses
    assert np.mean(losses[5:]) < 0.9 * np.mean(losses[:5])


# --- however the work is cut up


@pytest.mark.parametrize(
    "name",
    [
        "one pair at a time",
        "padded",
        "activations recomputed",
        "zero 1",
        "zero 2",
        "zero 3",
        "without logits",
        "without logits, zero 3",
    ],
)
def test_cutting_the_work_or_the_model_up_changes_nothing(trained, name):
    base, other = trained("base"), trained(name)
    assert other.losses == pytest.approx(base.losses, rel=1e-5)
    assert gap(other.weights, base.weights) < 1e-5
    assert [step["tokens"] for step in other.steps] == [step["tokens"] for step in base.steps]


@pytest.mark.parametrize("name", ["bf16", "bf16, zero 1", "bf16, zero 2"])
def test_bf16_trains_float32_master_weights(trained, name):
    run, base = trained(name), trained("base")
    assert np.mean(run.losses) == pytest.approx(np.mean(base.losses), rel=0.05)
    weights = run.weights
    assert {value.dtype for value in weights.values()} == {torch.float32}
    # Most of the small changes would be lost if the weights were rounded to bf16.
    assert any((value != value.bfloat16().float()).any() for value in weights.values())
    assert gap(weights, base.weights) < 0.01


@pytest.mark.parametrize("stage", range(4))
def test_a_bf16_training_that_does_not_move_returns_the_weights_it_was_given(trained, tiny_model, stage):
    # Rounded to bf16 at the start or at the end, they would lose the small steps of the iteration before.
    assert gap(trained(f"bf16, zero {stage}, no step").weights, load_file(tiny_model / "model.safetensors")) < 1e-20


def test_a_model_that_is_cut_up_while_it_loads_is_the_same_function(trained):
    # zero.Init makes the rotary frequencies in bf16, which no file can mend.
    first = [trained(f"bf16, zero {stage}, no step").losses[0] for stage in range(4)]
    assert first[1:] == pytest.approx([first[0]] * 3, rel=1e-5)


def test_the_first_update_of_adamw_in_bf16_is_as_long_as_the_learning_rate(trained, tiny_model):
    # Adam's bias correction makes it so. DeepSpeed would have made a step of zero gradients before it, and this one 0.74 of the rate.
    before, after = load_file(tiny_model / "model.safetensors"), trained("bf16, adamw").weights
    moves = torch.cat([(after[name] - before[name]).abs().flatten() for name in after])
    assert float(moves[moves > 0].median()) == pytest.approx(BASE["learning_rate"], rel=0.01)


def test_bf16_gradients_add_up_over_micro_batches(trained):
    whole, cut = trained("bf16"), trained("bf16, one pair at a time")
    assert cut.losses[:2] == pytest.approx(whole.losses[:2], rel=0.02)
    assert np.mean(cut.losses) == pytest.approx(np.mean(whole.losses), rel=0.05)


def test_a_checkpoint_in_bf16_is_the_rounded_one(trained):
    base, half = trained("base").weights, trained("saved in bf16").weights
    assert all(torch.equal(value, base[name].bfloat16()) for name, value in half.items())


@pytest.mark.parametrize(
    ("name", "dtype"), [("base", "float32"), ("bf16", "float32"), ("zero 3", "float32"), ("saved in bf16", "bfloat16")]
)
def test_a_checkpoint_says_which_dtype_its_weights_have(trained, name, dtype):
    # transformers loads in the dtype that config.json names: a wrong one rounds float32 weights in silence.
    assert json.loads((trained(name).model / "config.json").read_text())["dtype"] == dtype
    assert {str(value.dtype) for value in trained(name).weights.values()} == {f"torch.{dtype}"}


def test_weights_that_are_nan_stop_the_training_by_the_step_and_its_rows(trained):
    error = (trained("diverged").out / "error").read_text()
    assert "ContractError: step 1: loss nan, " in error and "; its rows: p" in error
    assert not trained("diverged").model.exists()


# --- checkpoints to resume from


def test_a_checkpoint_is_saved_when_its_time_has_come(trained):
    assert sealed(trained("saved all the time").out / "resume") == "step9"  # after the last step there is the export
    assert not (trained("base").out / "resume").exists()  # its ten steps took less than a quarter of an hour
    assert trained("saved all the time").losses == trained("base").losses


def test_the_clock_of_checkpoints(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("stages.training.loop.time.monotonic", lambda: now[0])
    by_time, by_both = SaveClock(900, None), SaveClock(900, 4)
    now[0] += 899.0
    assert [done for done in range(1, 9) if by_both.is_due(done)] == [4, 8] and not by_time.is_due(4)
    now[0] += 1.0
    assert by_time.is_due(5) and by_both.is_due(5)
    by_time.saved()
    assert not by_time.is_due(6)


# --- through the command


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Command:
    """`python -m stages train` in a store of its own."""

    def __init__(self, directory: Path, policy: Path, rows: list[dict], make_artifact, **changes):
        self.store = Store(directory / "store")
        pairs = make_artifact(self.store, "weighted_pairs", rows)
        settings = config(**changes)
        self.spec = directory / "spec.json"
        self.spec.write_text(
            json.dumps(
                {
                    "config": settings,
                    "inputs": {"pairs": pairs.key, "policy": str(policy)},
                    "store": str(self.store.root),
                }
            )
        )
        key = STAGES["train"].key(
            TrainingConfig.model_validate(settings), {"pairs": pairs, "policy": external_model(policy)}
        )
        self.out = self.store.directory("checkpoint", key)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "stages", "train", str(self.spec)]
        with open(self.spec.with_name("log"), "a") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def run(self) -> Trained:
        code = self.start().wait(240)
        assert code == 0, self.spec.with_name("log").read_text()[-3000:]
        return Trained(self.out, self.out)

    def tries(self) -> list[list[int]]:
        """For each try, the steps it did."""
        found: list[list[int]] = []
        for event in events(self.out):
            if event["event"] == "start":
                found.append([])
            elif event["event"] == "step":
                found[-1].append(event["index"])
        return found

    def kill_after(self, step: int) -> None:
        """Start, and SIGKILL the whole tree as soon as `step` steps are done."""
        process = self.start()
        deadline = time.monotonic() + 120
        while not any(step in done for done in self.tries()):
            assert process.poll() is None and time.monotonic() < deadline, self.spec.with_name("log").read_text()[
                -3000:
            ]
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert self.store.find("checkpoint", self.out.name) is None, "it was over before it was killed"


@pytest.fixture
def command(tmp_path, tiny_model, rows, make_artifact):
    return lambda **changes: Command(tmp_path, tiny_model, rows, make_artifact, **changes)


def check_resumed(command: Command, every: int) -> None:
    """It went on from the last saved step, and did no other step twice."""
    first, second = command.tries()
    saved = first[-1] // every * every
    assert second[0] in (saved + 1, saved - every + 1)  # the last one may have been killed while it was saved
    assert second[-1] == 10 and second == list(range(second[0], 11))


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", "bfloat16"), pytest.param("base", "float32", marks=pytest.mark.slow)]
)
def test_a_training_killed_in_mid_epoch_ends_with_the_very_same_weights(command, trained, tiny_model, name, dtype):
    train = command(dtype=dtype, runtime={"save_every_steps": 2}, checkpoints=[0.3, 0.6])
    train.kill_after(3)
    run = train.run()
    check_resumed(train, 2)
    for step in (3, 6):  # one was kept, or being kept, when it was killed
        check_model_directory(train.out / "steps" / f"{step:06d}")
    assert run.losses == trained(name).losses
    assert sha256(run.model / "model.safetensors") == sha256(trained(name).model / "model.safetensors")
    # And the artifact is complete: signed, without what was needed to resume, with the policy's tokenizer.
    record = train.store.load("checkpoint", train.out.name)
    assert train.store.problems(record, deep=True) == [] and record.provenance["starts"] == 2
    assert not (train.out / "resume").exists() and not (train.out / ".export").exists()
    check_model_directory(train.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (train.out / name).read_bytes() == (tiny_model / name).read_bytes()
    assert record.metrics["steps"] == 10 and record.metrics["first_loss"] == run.losses[0]
    assert record.metrics["loss"] == pytest.approx(np.mean(run.losses[5:]))


def test_two_ranks_train_as_one(command, trained):
    run, base = command(runtime={"num_processes": 2, "batch_tokens": 100}).run(), trained("base")
    assert run.losses == pytest.approx(base.losses, rel=1e-5)
    assert gap(run.weights, base.weights) < 1e-5
    assert [step["tokens"] for step in run.steps] == [step["tokens"] for step in base.steps]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_of_a_bf16_training_that_does_not_move_return_the_weights_they_were_given(command, tiny_model, stage):
    run = command(
        dtype="bfloat16", learning_rate=1e-30, runtime={"num_processes": 2, "batch_tokens": 60, "zero_stage": stage}
    ).run()
    assert gap(run.weights, load_file(tiny_model / "model.safetensors")) < 1e-20


@pytest.mark.slow
def test_two_ranks_cut_up_a_model_of_odd_sizes(tmp_path, tiny_model, rows, make_artifact):
    # DeepSpeed's own setter of masters fails under ZeRO 3 where a tensor's size is no multiple of the ranks.
    from transformers import GPT2Config, GPT2LMHeadModel

    odd = Path(shutil.copytree(tiny_model, tmp_path / "odd"))
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=320, n_embd=33, n_layer=2, n_head=3, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(settings).save_pretrained(odd)
    train = Command(
        tmp_path, odd, rows, make_artifact,
        dtype="bfloat16", learning_rate=1e-30, runtime={"num_processes": 2, "batch_tokens": 60, "zero_stage": 3},
    )  # fmt: skip
    weights, stored = train.run().weights, load_file(odd / "model.safetensors")
    assert gap({name: weights[name] for name in stored}, stored) < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_with_zero_train_as_one(command, trained, stage):
    run, base = command(runtime={"num_processes": 2, "batch_tokens": 60, "zero_stage": stage}).run(), trained("base")
    assert run.losses == pytest.approx(base.losses, rel=1e-5)
    assert gap(run.weights, base.weights) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "runtime"),
    [
        ("float32", {"num_processes": 2, "batch_tokens": 100}),
        ("float32", {"num_processes": 2, "zero_stage": 2}),
        ("bfloat16", {"num_processes": 2, "zero_stage": 2}),
        ("bfloat16", {"zero_stage": 3}),
    ],
    ids=str,
)
def test_a_killed_training_resumes_bit_by_bit_with_ranks_and_zero_too(
    tmp_path, tiny_model, rows, make_artifact, dtype, runtime
):
    shas = []
    for name, kill in (("whole", None), ("killed", 3)):
        (tmp_path / name).mkdir()
        train = Command(
            tmp_path / name, tiny_model, rows, make_artifact, dtype=dtype, runtime=runtime | {"save_every_steps": 2}
        )
        if kill:
            train.kill_after(kill)
        shas.append(sha256(train.run().model / "model.safetensors"))
    check_resumed(train, 2)
    assert shas[0] == shas[1]


@pytest.mark.gpu
def test_a_training_killed_on_a_gpu_goes_on_from_its_last_checkpoint(command):
    train = command(dtype="bfloat16", runtime={"device": "cuda", "save_every_steps": 2})
    train.kill_after(3)
    run = train.run()
    check_resumed(train, 2)
    assert len(run.losses) == 10 and np.isfinite(run.losses).all()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_on_two_gpus_train_as_one(command, trained, stage):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run = command(runtime={"device": "cuda", "num_processes": 2, "zero_stage": stage}).run()
    assert run.losses == pytest.approx(trained("base").losses, rel=1e-3)
