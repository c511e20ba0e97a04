"""The policy's weights: on the device in the training's dtype, the float32 masters out of memory-mapped files.

Strategy: small models saved as others save them (float32, bf16, names without the base model's prefix, weights laid out
in another way); what transformers loads in float32 is the reference.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.models.policy import load_causal_lm
from stages.training.weights import StoredWeights, load_policy

SETTINGS = {"zero_optimization": {"stage": 0}}


def rewritten(directory: Path, target: Path, change) -> Path:
    """A copy of a model directory whose tensors went through `change(name, tensor) -> (name, tensor)`."""
    target.mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = dict(change(name, tensor) for name, tensor in load_file(directory / "model.safetensors").items())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def masters_of(directory: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(str(directory), "bfloat16", "cpu", SETTINGS)
    assert policy.dtype == torch.bfloat16
    names = {parameter: name for name, parameter in policy.named_parameters()}
    return {names[parameter]: read() for parameter, read in StoredWeights(str(directory), policy).masters()}


def exact(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: weight.detach() for name, weight in load_causal_lm(str(directory), "float32", "cpu").named_parameters()
    }


def check(directory: Path) -> None:
    masters, reference = masters_of(directory), exact(directory)
    assert masters.keys() == reference.keys()
    assert all(torch.equal(masters[name].float(), reference[name]) for name in reference)


def test_masters_are_the_stored_weights_and_no_second_model_is_loaded(tiny_model, monkeypatch):
    policy = load_policy(str(tiny_model), "bfloat16", "cpu", SETTINGS)
    monkeypatch.setattr("stages.training.weights.load_causal_lm", lambda *_: pytest.fail("a float32 copy on the host"))
    stored = StoredWeights(str(tiny_model), policy)
    masters = dict(stored.masters())
    assert set(masters) == set(policy.parameters())  # the tied head once
    weights = load_file(tiny_model / "model.safetensors")
    for name, parameter in policy.named_parameters():
        assert torch.equal(masters[parameter](), weights[name])
    assert not stored.are_bfloat16()


def test_a_checkpoint_in_bf16_needs_no_masters(tiny_model, tmp_path):
    half = rewritten(tiny_model, tmp_path / "half", lambda name, tensor: (name, tensor.bfloat16()))
    policy = load_policy(str(half), "bfloat16", "cpu", SETTINGS)
    assert StoredWeights(str(half), policy).are_bfloat16()


def test_names_without_the_prefix_of_the_base_model_are_found(tiny_model, tmp_path):
    check(rewritten(tiny_model, tmp_path / "bare", lambda name, tensor: (name.removeprefix("model."), tensor)))


def test_weights_that_transformers_converts_come_from_a_copy_of_the_model(tiny_model, tmp_path, monkeypatch):
    # A file of one tensor that is not the parameter: what a conversion while loading looks like from here.
    policy = load_policy(str(tiny_model), "bfloat16", "cpu", SETTINGS)
    name = "model.layers.0.mlp.up_proj.weight"
    other = rewritten(
        tiny_model, tmp_path / "other", lambda key, tensor: (key, tensor.flip(0) if key == name else tensor)
    )
    stored = StoredWeights(str(other), policy)
    stored.directory = str(tiny_model)
    names = {parameter: name for name, parameter in policy.named_parameters()}
    reference = exact(tiny_model)
    assert all(torch.equal(read(), reference[names[parameter]]) for parameter, read in stored.masters())


def test_a_gpu_reads_the_files_itself(tiny_model, monkeypatch):
    asked = {}

    def from_pretrained(directory, **options):
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    for device, device_map in (("cuda:1", {"": "cuda:1"}), ("cpu", None)):
        with pytest.raises(InterruptedError):
            load_causal_lm(str(tiny_model), "bfloat16", device)
        assert asked["device_map"] == device_map and asked["dtype"] == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_holds_the_weights_once_and_the_host_none(tiny_model, dtype):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_causal_lm(str(tiny_model), dtype, "cuda:0")
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert {weight.device for weight in model.parameters()} == {torch.device("cuda", 0)}
    assert torch.cuda.max_memory_allocated() - before < 2 * size + 2**21
    reference = exact(tiny_model)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.cpu(), reference[name].to(weight.dtype))
