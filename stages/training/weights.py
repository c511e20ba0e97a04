"""Stages - how the policy's weights get onto the device, and its float32 master weights out of the files.

Each rank holds the weights in the training's dtype only, on its device; under ZeRO 3 it never holds more than its part
and one module. The master weights are read tensor by tensor from memory-mapped safetensors: the ranks of a node share
the page cache, so no rank keeps a float32 copy on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.models.lazy import torch
from stages.models.policy import load_causal_lm

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel


def load_policy(directory: str, dtype: str, device: str, deepspeed_settings: dict[str, Any]) -> PreTrainedModel:
    """Return the policy on a device in a dtype; under ZeRO 3 already cut over the ranks (deepspeed.zero.Init)."""
    if deepspeed_settings["zero_optimization"]["stage"] < 3:
        return load_causal_lm(directory, dtype, device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # While this object lives, transformers makes every module cut up and reads its weights shard by shard.
    zero3 = HfDeepSpeedConfig(deepspeed_settings)
    model = load_causal_lm(directory, dtype, device)
    del zero3
    _restore_buffers(model)
    return model


def _restore_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that are in no file (rotary frequencies) again in float32: zero.Init made them in bf16."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        buffers = {name: buffer for name in names if (buffer := module._buffers[name]) is not None}
        if not any(buffer.is_floating_point() for buffer in buffers.values()):
            continue
        for name, buffer in buffers.items():
            module._buffers[name] = buffer.float() if buffer.is_floating_point() else buffer
        model._init_weights(module)


class StoredWeights:
    """The weights in a model directory's safetensors files, by the names of a model's parameters."""

    def __init__(self, directory: str, model: PreTrainedModel):
        from safetensors import safe_open

        self.directory, self.model = directory, model
        self.files = [
            safe_open(path, framework="pt", device="cpu") for path in sorted(Path(directory).glob("*.safetensors"))
        ]
        self.stored = {name: file for file in self.files for name in file.keys()}  # noqa: SIM118 - not a mapping

    def are_bfloat16(self) -> bool:
        """Whether bf16 holds every weight exactly: then DeepSpeed's own master weights are right."""
        return all(self.stored[name].get_slice(name).get_dtype() == "BF16" for name in self.stored)

    def masters(self) -> Iterator[tuple[Parameter, Callable[[], Tensor]]]:
        """Yield (parameter, function that reads its weight) for every parameter of the model.

        Where a file's names or shapes are not the model's (transformers converts them while it loads), the weights
        come from a second copy of the model on the host.
        """
        named = dict(self.model.named_parameters(remove_duplicate=False))
        names: dict[Parameter, str] = {}
        for name, parameter in named.items():
            for candidate in (name, name.removeprefix(f"{self.model.base_model_prefix}.")):
                if candidate in self.stored and self._fits(candidate, parameter):
                    names.setdefault(parameter, candidate)
        if all(parameter in names for parameter in named.values()):
            for parameter, name in names.items():
                yield parameter, lambda name=name: self.stored[name].get_tensor(name)
            return
        copy = load_causal_lm(self.directory, "float32", "cpu")
        for parameter, exact in zip(self.model.parameters(), copy.parameters(), strict=True):
            yield parameter, lambda exact=exact: exact.detach()

    def _fits(self, name: str, parameter: Parameter) -> bool:
        """Whether a stored tensor is the parameter's weight: of its shape and, if it is whole, equal once rounded."""
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of a parameter that is cut up
        if list(self.stored[name].get_slice(name).get_shape()) != list(shape):
            return False
        if hasattr(parameter, "ds_shape"):
            return True
        stored = self.stored[name].get_tensor(name).to(parameter.device)
        return torch.equal(stored.to(parameter.dtype), parameter.detach())
