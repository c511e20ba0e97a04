"""QLoRA on a CPU: bitsandbytes' CPU build has NF4. Where the package is absent (no lock has it), the tests skip, but for the sentence that says so.

Strategy: the tiny model in float32 arithmetic, so that what is left is the rounding to 4 bits. A training in one process of its own.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_contracts.adapter import ADAPTER
from data_contracts.errors import ConfigError
from data_contracts.store import Store
from stages.models import policy
from stages.models.adapters import switched, trainable
from stages.models.policy import QUANTISED, load_causal_lm, score_responses
from tests.stages.models.test_adapters import IDS, logits
from tests.stages.training.test_adapter import FAST, LORA, factors
from tests.stages.training.test_training import (
    DRIVER,
    ROOT,
    Trained,
    config,
    reference_model,  # noqa: F401
    rows,  # noqa: F401
)

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install --no-deps bitsandbytes",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, rows, make_artifact):  # noqa: F811
    """One epoch with an adapter on 4-bit weights."""
    root = tmp_path_factory.mktemp("qlora")
    pairs = make_artifact(Store(root / "store"), "weighted_pairs", rows).path
    settings = config(**FAST | {"adapter": LORA | {"name": "qlora"}, "epochs": 1, "batch_size": 22})
    (root / "work.json").write_text(json.dumps([("qlora", settings, {"pairs": pairs, "policy": str(tiny_model)})]))
    (root / "out").mkdir()
    command = [sys.executable, "-c", DRIVER, str(root / "work.json"), str(root / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    error = root / "out" / "qlora" / "error"
    assert not error.exists(), error.read_text()
    return Trained(root / "out" / "qlora", root / "out" / "qlora" / ".export")


@needs_bitsandbytes
def test_a_4_bit_base_is_its_rounded_weights_and_the_adapter_off_leaves_it(tiny_model):
    import bitsandbytes

    model = load_causal_lm(str(tiny_model), QUANTISED + "float32", "cpu").eval()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == torch.uint8 and model.lm_head.weight.dtype == torch.float32
    before = logits(model)
    plain = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            rounded = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weight = plain.get_submodule(name).weight
            assert 0 < (rounded - weight).abs().mean() < 0.15 * weight.abs().mean()
            weight.data = rounded
    torch.testing.assert_close(before, logits(plain), atol=1e-4, rtol=1e-4)
    from stages.models.adapters import add_adapter
    from stages.training.adapter import lora_config
    from stages.training.config import AdapterConfig

    add_adapter(model.requires_grad_(False), lora_config(AdapterConfig(name="qlora", rank=4)))
    assert len(trainable(model)) == 2 * 7 * 2 and {value.dtype for value in trainable(model)} == {torch.float32}
    assert torch.equal(logits(model), before)
    torch.nn.functional.cross_entropy(
        model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    ).backward()
    for parameter in trainable(model):
        parameter.data += 0.05
    assert not torch.equal(logits(model), before)
    with switched(model, None):
        assert torch.equal(logits(model), before)


@needs_bitsandbytes
def test_a_training_moves_the_factors_and_merges_them_into_the_float32_weights(trained, tiny_model, rows):  # noqa: F811
    start, merged, adapter = load_file(tiny_model / "model.safetensors"), trained.weights, factors(trained)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        change = (
            2.0 * adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
        )
        assert (merged[f"{name}.weight"] - start[f"{name}.weight"] - change).abs().max() < 1e-6
    # The weigh stage's pass over 4-bit weights is the function that the first step starts from.
    model = load_causal_lm(str(tiny_model), QUANTISED + "float32", "cpu").eval()
    chosen = score_responses(model, [row["prompt_ids"] for row in rows], [row["chosen_ids"] for row in rows], 4096)
    assert trained.steps[0]["logps/chosen"] == pytest.approx(np.mean([values.sum() for values in chosen]), rel=1e-5)


@needs_bitsandbytes
def test_a_pass_over_a_trained_policy_is_the_4_bit_base_with_its_adapter(trained, tiny_model, monkeypatch):
    monkeypatch.setattr(policy, "base_of", lambda checkpoint: tiny_model)  # there is no record beside an export
    model = load_causal_lm(str(trained.model), QUANTISED + "float32", "cpu")
    names = {name for name, _ in model.named_parameters()}
    assert any("lora_A" in name for name in names) and (trained.model / ADAPTER).is_dir()
    assert model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.dtype == torch.uint8


def test_without_the_package_a_sentence_says_so(tiny_model, monkeypatch):
    monkeypatch.setattr(policy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed: pip install"):
        load_causal_lm(str(tiny_model), QUANTISED + "bfloat16", "cpu")
