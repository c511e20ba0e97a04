"""Training an adapter: the numbers of a plain torch loop over its factors alone, however the work is cut up, dealt or interrupted.

Strategy: as in test_training.py, whose rows, plain loop and command these are. One process runs all the single-rank variants; the later
ones go on from what the first left. Two ranks and a kill go through the real command.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_contracts.adapter import ADAPTER, ADAPTER_WEIGHTS, BASE
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import check_model_directory, external_model
from data_contracts.config import parse
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from stages.methods import METHODS
from stages.models.adapters import add_adapter
from stages.models.policy import load_causal_lm
from stages.training.adapter import check_adapters, lora_config
from stages.training.config import AdapterConfig, TrainingConfig
from tests.stages.training.test_training import (  # the fixtures too
    DRIVER,
    ROOT,
    Command,
    Trained,
    config,
    gap,
    plain_loop,
    reference_model,  # noqa: F401
    rows,  # noqa: F401
    sha256,
)

# Each variant's export becomes a policy that others go on from: with the tokenizer that the stage would have copied.
CHAIN = """
    if (out / ".export").is_dir():
        for path in Path(sys.argv[3]).glob("*token*"):
            shutil.copy(path, out / ".export")
"""
LORA = {"name": "lora", "rank": 4, "alpha": 8}
FAST = {"learning_rate": 1e-4, "adapter": LORA}
TDPO = FAST | {"method": {"name": "tdpo"}, "warmup_ratio": 0}
KILLED = {"adapter": LORA | {"dropout": 0.1, "save_merged": False}, "dtype": "bfloat16"}
VARIANTS = {
    "base": FAST,
    "one pair at a time": FAST | {"runtime": {"batch_tokens": 1}},
    "padded": FAST | {"runtime": {"packing": False}},
    "activations recomputed": FAST | {"runtime": {"gradient_checkpointing": True}},
    "zero 1": FAST | {"runtime": {"zero_stage": 1}},
    "zero 2": FAST | {"runtime": {"zero_stage": 2, "batch_tokens": 100}},
    "adapter only": FAST | {"adapter": LORA | {"save_merged": False}},
    "to be killed": FAST | KILLED,
    "bf16": FAST | {"dtype": "bfloat16"},
    "bf16, zero 2": FAST | {"dtype": "bfloat16", "runtime": {"zero_stage": 2}},
    "bf16, no step": FAST | {"dtype": "bfloat16", "learning_rate": 1e-30, "epochs": 1},
    "dora": FAST | {"adapter": LORA | {"use_dora": True}, "epochs": 1},
    "dropout": FAST | {"adapter": LORA | {"dropout": 0.2}, "epochs": 1},
    "goes on": FAST | {"policy": "base", "start": True, "epochs": 1},
    "another rank": FAST | {"policy": "base", "start": True, "adapter": LORA | {"rank": 8}},
    "begins anew": FAST | {"policy": "base", "epochs": 1},
    "reference is the start": TDPO | {"reference": "start"},
    "reference is the iterate": TDPO | {"policy": "base", "start": True, "reference": "base"},
    "start is the reference of the iterate": TDPO | {"policy": "base", "start": True, "reference": "start"},
    "reference is another model": TDPO | {"reference": "other"},
    **{
        f"method {name}": {
            "learning_rate": 1e-3,
            "adapter": LORA | {"save_merged": False},
            "epochs": 1,
            "batch_size": 2,
            "warmup_ratio": 0,
            "method": {"name": name},
            "runtime": {"may_leave_a_side": True},
            "reference": "start",
            "teacher": "other",
            "pairs": "few",
        }
        for name in METHODS.names()
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, reference_model, rows, make_artifact):  # noqa: F811
    """trained(variant) -> Trained, of a run of every variant."""
    root = tmp_path_factory.mktemp("variants")
    store = Store(root / "store")
    pairs = {
        "all": make_artifact(store, "weighted_pairs", rows).path,
        "few": make_artifact(store, "weighted_pairs", [with_every_column(row) for row in rows[:4]]).path,
    }
    models = {"start": str(tiny_model), "other": str(reference_model), "base": str(root / "out" / "base" / ".export")}
    work = []
    for name, changes in VARIANTS.items():
        inputs = {"pairs": pairs[changes.get("pairs", "all")], "policy": models[changes.get("policy", "start")]}
        inputs |= {"start": str(tiny_model)} if changes.get("start") else {}
        inputs |= {role: models[changes[role]] for role in ("reference", "teacher") if role in changes}
        given = ("policy", "start", "reference", "teacher", "pairs")
        settings = {key: value for key, value in changes.items() if key not in given}
        work.append((name, config(**settings), inputs))
    (root / "work.json").write_text(json.dumps(work))
    (root / "out").mkdir()
    command = [
        sys.executable,
        "-c",
        f"import shutil{DRIVER}{CHAIN}",
        str(root / "work.json"),
        str(root / "out"),
        str(tiny_model),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    def find(name: str) -> Trained:
        out = root / "out" / name
        if (out / "error").exists():
            raise ConfigError((out / "error").read_text())
        return Trained(out, out / ".export")

    return find


def with_every_column(row: dict) -> dict:
    """A row that any method can read."""
    more = {"teacher_prompt_ids": row["prompt_ids"], "teacher_ids": row["chosen_ids"]}
    more |= {f"{side}_old_logps": row[f"{side}_reference_logps"] for side in ("chosen", "rejected")}
    more |= {"score_chosen": 1.0, "score_rejected": 0.0, "group_scores": [1.0, 0.0], "group_win_rates": [0.7, 0.3]}
    return row | more


def factors(run: Trained) -> dict[str, torch.Tensor]:
    return load_file(run.model / ADAPTER / ADAPTER_WEIGHTS)


def seeded(settings: AdapterConfig):
    """What the stage does to a model before it trains an adapter."""

    def prepare(model):
        torch.manual_seed(config()["seed"])
        add_adapter(model.requires_grad_(False), lora_config(settings))

    return prepare


def test_losses_and_factors_are_those_of_a_plain_torch_loop(trained, tiny_model, rows):  # noqa: F811
    losses, _, weights = plain_loop(tiny_model, rows, config(**FAST), seeded(AdapterConfig(**LORA)))
    run = trained("base")
    assert run.losses == pytest.approx(losses, rel=1e-5)
    expected = {
        "base_model.model." + name.replace(".default", ""): value for name, value in weights.items() if "lora_" in name
    }
    assert gap(factors(run), expected) < 1e-5
    assert max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name) > 1e-3


def test_merged_weights_are_the_start_models_with_the_adapter_and_nothing_else(trained, tiny_model):
    run, start = trained("base"), load_file(tiny_model / "model.safetensors")
    adapter, merged = factors(run), run.weights
    assert merged.keys() == start.keys()
    for name, weight in start.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in adapter:
            change = 2.0 * adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()
            assert (merged[name] - weight - change).abs().max() < 1e-6 < change.abs().max()
        else:
            assert torch.equal(merged[name], weight)


@pytest.mark.parametrize(
    "name", ["one pair at a time", "padded", "activations recomputed", "zero 1", "zero 2", "adapter only"]
)
def test_cutting_the_work_or_the_optimizer_up_changes_nothing(trained, name):
    base, other = trained("base"), trained(name)
    assert other.losses == pytest.approx(base.losses, rel=1e-5)
    assert gap(factors(other), factors(base)) < 1e-5


@pytest.mark.parametrize("name", ["bf16", "bf16, zero 2"])
def test_frozen_weights_in_bf16_train_float32_factors(trained, tiny_model, name):
    run, base = trained(name), trained("base")
    assert np.mean(run.losses) == pytest.approx(np.mean(base.losses), rel=0.05)
    assert {value.dtype for value in factors(run).values()} == {torch.float32}
    # The merge reads the stored float32 weights, not the rounded ones that were trained on.
    norm = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(run.weights["model.embed_tokens.weight"], norm) and (norm != norm.bfloat16().float()).any()


def test_a_training_that_does_not_move_returns_the_start_model_to_the_bit(trained, tiny_model):
    weights, start = trained("bf16, no step").weights, load_file(tiny_model / "model.safetensors")
    assert gap(weights, start) < 1e-20


def test_an_adapter_alone_is_kept_with_the_config_of_its_base(trained):
    run = trained("adapter only")
    assert {path.name for path in run.model.iterdir() if "token" not in path.name} == {ADAPTER, "config.json"}


@pytest.mark.parametrize("name", ["dora", "dropout"])
def test_variants_of_the_adapter_train(trained, name):
    first, base = trained(name), trained("base")
    assert all(np.isfinite(first.losses)) and gap(first.weights, base.weights) > 1e-4


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_trains_an_adapter(trained, name):
    run = trained(f"method {name}")
    assert len(run.losses) == 2 and all(np.isfinite(run.losses))
    moved = [value.abs().max() for key, value in factors(run).items() if "lora_B" in key]
    assert min(moved) > 0


# --- from one iteration to the next


def test_the_next_iteration_goes_on_with_the_same_adapter_of_the_start_model(trained, tiny_model):
    run, before, start = trained("goes on"), trained("base"), load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (factors(run)[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    assert (run.weights[f"{name}.weight"] - start[f"{name}.weight"] - 2.0 * b @ a).abs().max() < 1e-6
    moved = gap(factors(run), factors(before))
    assert 1e-4 < moved < 0.1, "it began where the last one ended"
    with pytest.raises(ConfigError, match="has r 4, and training.adapter says 8"):
        trained("another rank")


def test_a_new_adapter_on_the_merged_policy_begins_where_the_last_one_ended(trained):
    begins, goes = trained("begins anew"), trained("goes on")
    assert begins.losses[0] == pytest.approx(goes.losses[0], rel=1e-4)
    assert gap(factors(begins), factors(goes)) > 1e-3


def test_the_held_reference_is_the_model_with_the_adapter_off_or_as_the_iteration_found_it(trained):
    """TDPO's divergence is 0 at the first step where policy and reference are one, and not 0 where they are not."""
    for name in ("reference is the start", "reference is the iterate"):
        steps = trained(name).steps
        assert steps[0]["kl/chosen"] == pytest.approx(0, abs=1e-6) and abs(steps[-1]["kl/chosen"]) > 1e-4
    assert trained("start is the reference of the iterate").steps[0]["kl/chosen"] > 1e-3
    with pytest.raises(ConfigError, match="is another model than"):
        trained("reference is another model")


# --- through the command


def test_a_killed_training_resumes_bit_by_bit_and_keeps_no_frozen_weights(
    tmp_path,
    trained,
    tiny_model,
    rows,  # noqa: F811
    make_artifact,
):
    settings = FAST | KILLED | {"runtime": {"save_every_steps": 2}, "checkpoints": [0.6]}
    train = Command(tmp_path, tiny_model, rows, make_artifact, **settings)
    train.kill_after(5)
    frozen = (tiny_model / "model.safetensors").stat().st_size
    for saved in (train.out / "resume").glob("step*"):
        assert sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) < frozen / 2
    run = train.run()
    assert train.tries()[1][0] > 1 and len(run.steps) == 10
    assert run.losses == trained("to be killed").losses
    assert sha256(run.model / ADAPTER / ADAPTER_WEIGHTS) == sha256(
        trained("to be killed").model / ADAPTER / ADAPTER_WEIGHTS
    )
    # The artifact names its base model, and is loaded with it.
    base = external_model(tiny_model).content
    for directory in (train.out, train.out / "steps" / "000006"):
        assert json.loads((directory / ADAPTER / BASE).read_text()) == {"content": base}
        check_model_directory(directory)
        model = load_causal_lm(str(directory), "float32", "cpu")
        assert any("lora_A" in name for name, _ in model.named_parameters())
    record = train.store.load("checkpoint", train.out.name)
    assert train.store.problems(record, deep=True) == []
    assert record.metrics["adapter_parameters"] == sum(value.numel() for value in factors(run).values())


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_two_ranks_train_as_one(tmp_path, trained, tiny_model, rows, make_artifact, stage):  # noqa: F811
    runtime = {"num_processes": 2, "batch_tokens": 100, "zero_stage": stage}
    run = Command(tmp_path, tiny_model, rows, make_artifact, **FAST | {"runtime": runtime}).run()
    assert run.losses == pytest.approx(trained("base").losses, rel=1e-5)
    assert gap(factors(run), factors(trained("base"))) < 1e-5
    assert gap(run.weights, trained("base").weights) < 1e-5


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"rank": 0}}, "adapter.rank"),
        ({"adapter": {"name": "prefix"}}, "adapter.name"),
        ({"adapter": {"targets": []}}, "targets names no layer"),
        ({"adapter": {"continue": False, "save_merged": False}}, "save_merged: false keeps none"),
        ({"adapter": {}, "runtime": {"zero_stage": 3}}, "ZeRO 3 cuts it up"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainingConfig, settings, "settings")


def test_without_an_adapter_settings_are_what_they_were():
    assert "adapter" not in TrainingConfig().identity()
    settings = TrainingConfig.model_validate({"adapter": {"continue": False}})
    assert settings.adapter.goes_on is False and settings.model_dump(mode="json")["adapter"]["continue"] is False
    assert TrainingConfig.model_validate(settings.model_dump(mode="json")) == settings
    assert settings.identity()["adapter"]["continue"] is False


def test_an_adapter_of_another_base_is_refused(tmp_path, trained, tiny_model):
    policy = trained("base").model
    (policy / ADAPTER / BASE).write_text('{"content": "of another model"}')
    inputs = {
        "policy": ArtifactRef(kind="checkpoint", key="k", path=str(policy), content="c"),
        "start": external_model(tiny_model),
    }
    with pytest.raises(ConfigError, match="has no adapter of the model"):
        check_adapters(TrainingConfig.model_validate({"adapter": LORA}), inputs)
