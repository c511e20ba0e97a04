"""Stages - low-rank adapters (LoRA) by peft: put into a model, switched, saved, loaded, and merged.

    python -m stages.models.adapters BASE ADAPTER OUT       write BASE with ADAPTER merged into it

    y = W x + s B A x,   W [o, i] frozen, A [r, i], B [o, r] float32, s = alpha / r (rsLoRA: alpha / sqrt(r))

(Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3; DoRA: Liu et al. 2024.) B begins as zero, so a new
adapter leaves the model as it is, to the bit. The layers are put into the transformers model itself: everything that
takes a model takes one with an adapter.

A merge is always W + s B A in float32, of the base model's stored weights and the whole adapter, then written: rounded
once, however many iterations the adapter went through.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from data_contracts.errors import ConfigError, ContractError, PipelineError
from data_contracts.files import follow_umask
from stages.models.lazy import import_transformers, torch
from stages.models.policy import load_causal_lm, save_model
from stages.running.cost import loading

if TYPE_CHECKING:
    from types import ModuleType

    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import Tensor
    from torch.nn import Module, Parameter
    from transformers import PreTrainedModel

POLICY, REFERENCE = "default", "reference"
"""Names of the adapters inside a model: the one that is trained, and the frozen one of a held reference."""
PREFIX = "base_model.model."
"""What peft and vLLM expect before a module's name in an adapter's file."""


def import_peft() -> ModuleType:
    """Return peft. Raises: ConfigError where it is not installed."""
    import_transformers()
    try:
        with loading():
            import peft
    except ImportError as error:
        raise ConfigError(
            f"peft does not import ({error}), and adapters need it: install the extra `cpu` or `gpu`, or name an "
            "interpreter that has it"
        ) from error
    return peft


def add_adapter(model: PreTrainedModel, config: LoraConfig, name: str = POLICY) -> None:
    """Freeze the model and put a new adapter into it, float32 whatever the model's dtype.

    Raises: ConfigError if the model has none of the target modules.
    """
    peft = import_peft()
    try:
        peft.inject_adapter_in_model(config, model, name)
    except ValueError as error:
        raise ConfigError(f"training.adapter: peft refuses the adapter: {error}") from None
    for layer in adapter_layers(model):
        for kind in layer.adapter_layer_names:
            parts: Any = getattr(layer, kind)
            if name in parts:
                parts[name].float()
        layer.set_adapter([POLICY], inference_mode=name == REFERENCE and POLICY not in layer.lora_A)


def load_adapter(model: PreTrainedModel, directory: Path | str, name: str = POLICY) -> None:
    """Put a stored adapter into a model. Its dropout is none unless it is trained on (POLICY).

    Raises: ConfigError if it is of another model.
    """
    peft, directory = import_peft(), Path(directory)
    read_adapter_config(directory)
    config = peft.LoraConfig.from_pretrained(str(directory))
    config.inference_mode = False
    if name != POLICY:
        config.lora_dropout = 0.0
    add_adapter(model, config, name)
    from safetensors.torch import load_file

    stored = {key.removeprefix(PREFIX): value for key, value in load_file(directory / ADAPTER_WEIGHTS).items()}
    try:
        result = peft.set_peft_model_state_dict(model, stored, name)
    except RuntimeError as error:
        raise ConfigError(f"the adapter in {directory} is of another base model: {_first_line(error)}") from None
    expected = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if misfits := sorted([*result.unexpected_keys, *(expected.keys() - stored.keys())]):
        raise ConfigError(f"the adapter in {directory} is of another base model: {misfits[0]} is not in both of them")


def save_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Write the trained adapter as peft does, in float32.

    Raises: ContractError if a number is not finite.
    """
    peft = import_peft()
    from safetensors.torch import save_file

    state: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ContractError(
                f"the trained weights hold NaN or infinity, first in {name}: lower training.learning_rate"
            )
    directory.mkdir(parents=True, exist_ok=True)
    settings = peft_settings(model).to_dict()
    # Sets have another order in each process, and equal adapters shall have equal files.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    plain |= {"inference_mode": True, "base_model_name_or_path": None}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    tensors = {PREFIX + name: value.detach().float().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, {"format": "pt"})
    follow_umask(directory)


def peft_settings(model: PreTrainedModel, name: str = POLICY) -> LoraConfig:
    """Return the settings that an adapter inside a model was made with."""
    configs: Any = getattr(model, "peft_config")  # noqa: B009 - set by peft
    return configs[name]


def adapter_layers(model: Module) -> Iterator[LoraLayer]:
    """Yield the layers of a model that hold adapters."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def trainable(model: Module) -> list[Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def switched(model: Module, name: str | None) -> Iterator[None]:
    """Let another adapter of the model be in effect, or none: for passes without gradients, inside a training step.

    peft's own switch also sets requires_grad, which DeepSpeed reads.
    """
    layers = list(adapter_layers(model))
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = name is None, [name or POLICY]
        yield
    finally:
        for layer, (is_off, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = is_off, active


def merge_into(model: PreTrainedModel) -> None:
    """Add the adapter to the model's weights, in their dtype, and take its layers out."""
    layers = set(adapter_layers(model))
    for name, module in list(model.named_modules()):
        if module in layers:
            layer: Any = module
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def merge(base: Path | str, adapter: Path | str, out: Path, dtype: str = "float32") -> None:
    """Write the model `base` with an adapter added to it, computed in float32 and saved in `dtype`.

    Raises: ConfigError if the adapter is of another model.
    """
    model = load_causal_lm(str(base), "float32", "cpu")
    load_adapter(model, adapter)
    merge_into(model)
    state = {name: value.detach().to(getattr(torch, dtype)) for name, value in model.named_parameters()}
    save_model(model, state, out, dtype)


def adapter_checkpoint(base: Path | str, out: Path) -> None:
    """Make `out` a checkpoint of an adapter alone: with the base model's config.json beside it."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(base) / "config.json", out / "config.json")


def main(arguments: list[str]) -> int:
    """Merge an adapter; prints the problem where it cannot be, and returns the exit code."""
    base, adapter, out = arguments
    try:
        merge(base, adapter, Path(out))
    except PipelineError as error:
        print(error)
        return error.exit_code
    return 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
