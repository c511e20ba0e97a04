"""Adapters: what peft's layers compute is W + s B A, forwards, backwards and merged, and off they are not there.

Strategy: the tiny model in float32 with random factors in every linear layer. Merged weights are held against the same
sum in float64, and beside it stands what merging in bf16, iteration after iteration, makes of it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_contracts.adapter import ADAPTER, base_of, weights_directory, write_base
from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.checkpoint import check_model_directory, external_model
from data_contracts.errors import ConfigError
from stages.models.adapters import (
    adapter_checkpoint,
    add_adapter,
    load_adapter,
    merge,
    save_adapter,
    switched,
    trainable,
)
from stages.models.policy import load_causal_lm
from stages.running.cost import parameters
from stages.training.adapter import lora_config
from stages.training.config import AdapterConfig

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41], [7, 7, 120, 300, 2, 64, 19]])
LAYER = "model.layers.1.mlp.up_proj"


def with_adapter(directory, dtype="float32", seed=0, size=0.05, **settings):
    """The model with a random adapter: of B = 0 nothing could be seen."""
    model = load_causal_lm(str(directory), dtype, "cpu").eval().requires_grad_(False)
    add_adapter(model, lora_config(AdapterConfig(**settings)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape) * size)
    return model


def checkpoint_of_an_adapter(directory: Path, base: Path) -> ArtifactRef:
    """A checkpoint as a training with `save_merged: false` leaves it, with a record that names its base model."""
    save_adapter(with_adapter(base, rank=4), directory / ADAPTER)
    adapter_checkpoint(base, directory)
    write_base(directory / ADAPTER, external_model(base).content)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and not (directory / path.name).exists():
            shutil.copy(path, directory)
    record = ArtifactRecord(
        kind="checkpoint", key="made", stage="train", version="1", config={}, files=[], rows=0,
        inputs={"policy": external_model(base)}, content="of this test",
    )  # fmt: skip
    (directory / "record.json").write_text(record.model_dump_json())
    return record.ref(str(directory))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank": 4}, {"use_dora": True}], ids=str)
def test_merged_logits_are_those_of_base_and_adapter(tmp_path, tiny_model, settings):
    model = with_adapter(tiny_model, **settings)
    save_adapter(model, tmp_path / ADAPTER)
    merge(tiny_model, tmp_path / ADAPTER, tmp_path / "merged")
    before, merged = (
        logits(load_causal_lm(str(tiny_model), "float32", "cpu")),
        logits(load_causal_lm(str(tmp_path / "merged"), "float32", "cpu")),
    )
    assert (merged - before).abs().max() > 0.1
    torch.testing.assert_close(merged, logits(model), atol=1e-5, rtol=1e-5)
    stored = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    load_adapter(stored, tmp_path / ADAPTER)
    assert torch.equal(logits(stored), logits(model))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank": 4, "alpha": 3}], ids=str)
def test_the_gradient_of_the_factors_is_the_full_gradient_through_them(tmp_path, tiny_model, settings):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW of the merged model."""
    model = with_adapter(tiny_model, **settings)
    save_adapter(model, tmp_path / ADAPTER)
    merge(tiny_model, tmp_path / ADAPTER, tmp_path / "merged")
    full = load_causal_lm(str(tmp_path / "merged"), "float32", "cpu").eval()
    for policy in (model, full):
        torch.nn.functional.cross_entropy(
            policy(input_ids=IDS).logits.flatten(0, 1), IDS.roll(-1, 1).flatten()
        ).backward()
    rank, alpha = settings.get("rank", 16), settings.get("alpha", 32)
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 2 * 7 and "lm_head" not in names
    for name in names:
        layer, gradient = model.get_submodule(name), full.get_submodule(name).weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, scale * gradient @ a.detach().T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.grad, scale * b.detach().T @ gradient, atol=1e-5, rtol=1e-4)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_off_or_new_an_adapter_leaves_the_start_model_to_the_bit(tiny_model, dtype):
    plain, model = load_causal_lm(str(tiny_model), dtype, "cpu").eval(), with_adapter(tiny_model, dtype)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    with switched(model, None):
        assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(plain))
    add_adapter(plain, lora_config(AdapterConfig()))
    assert torch.equal(logits(plain), logits(load_causal_lm(str(tiny_model), dtype, "cpu")))


def test_five_iterations_merged_from_the_start_model_do_not_drift(tmp_path, tiny_model, capsys):
    """Against float64: merging the whole adapter into the start model, and merging each iteration's step into the bf16
    model of the iteration before, as others do."""
    model, path = with_adapter(tiny_model, size=0.002), tmp_path / ADAPTER
    name = f"{LAYER}.weight"
    start = load_file(tiny_model / "model.safetensors")[name]
    layer = model.get_submodule(LAYER)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    drifting, before = start.bfloat16(), 0.0
    torch.manual_seed(1)
    for iteration in range(5):
        with torch.no_grad():
            for parameter in trainable(model):
                parameter += torch.randn(parameter.shape) * 0.002
        save_adapter(model, path)
        merge(tiny_model, path, tmp_path / f"iteration-{iteration}")
        product = 2.0 * b.detach().double() @ a.detach().double()
        drifting = (drifting.double() + product - before).bfloat16()
        before = product
    exact = start.double() + product
    merged = load_file(tmp_path / "iteration-4" / "model.safetensors")[name]
    ours, theirs = (merged - exact).abs().max(), (drifting - exact).abs().max()
    moved = (exact - start).abs().max()
    print(f"largest change {moved:.2e}; error of the float32 merge {ours:.1e}, of five merges in bf16 {theirs:.1e}")
    assert ours < 1e-6 and theirs > 100 * ours and theirs > 0.5 * moved


def test_named_layers_alone_get_factors_and_unknown_ones_are_refused(tiny_model):
    model = with_adapter(tiny_model, targets=("q_proj", "v_proj"))
    assert len(trainable(model)) == 2 * 2 * 2
    with pytest.raises(ConfigError, match="nowhere_proj"):
        with_adapter(tiny_model, targets=("nowhere_proj",))


def test_equal_adapters_have_equal_files(tmp_path, tiny_model):
    for name in ("one", "two"):
        save_adapter(with_adapter(tiny_model), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"]) and str(tiny_model) not in str(settings)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model, make_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    save_adapter(with_adapter(tiny_model), tmp_path / ADAPTER)
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=1, intermediate_size=96)
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(ConfigError, match="of another base model"):
        merge(other, tmp_path / ADAPTER, tmp_path / "merged")


def test_a_checkpoint_of_an_adapter_alone_is_its_base_with_the_adapter(tmp_path, tiny_model):
    path = Path(checkpoint_of_an_adapter(tmp_path / "checkpoint", tiny_model).path)
    check_model_directory(path)
    assert weights_directory(path) == base_of(path) == tiny_model
    assert parameters(str(path)) == parameters(str(tiny_model))
    model = load_causal_lm(str(path), "float32", "cpu").eval()
    assert torch.equal(logits(model), logits(with_adapter(tiny_model, rank=4))) and trainable(model) == []
    content = external_model(path).content
    (path / ADAPTER / "adapter_model.safetensors").write_bytes(b"other factors")
    assert external_model(path).content != content
    record = json.loads((path / "record.json").read_text())
    record["inputs"]["policy"] |= {"path": str(tmp_path / "gone")}
    (path / "record.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="the base model of the adapter in .* is gone"):
        weights_directory(path)
    (path / "record.json").unlink()
    with pytest.raises(ConfigError, match="no record.json names its base model"):
        weights_directory(path)
