"""Stages - a scorer's model: where it lies, what it is in a key, and strict loading of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_contracts.checkpoint import ModelRef, model_content
from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow
from stages.models.hub import model_directory
from stages.models.lazy import torch
from stages.models.policy import pick_device
from stages.registry import Named
from stages.scoring.base import Scorer

if TYPE_CHECKING:
    from torch import Tensor, nn

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_TOKENS, GPU_TOKENS = 4096, 32_768
"""Padded tokens per forward of a scorer's network where scoring.runtime.batch_tokens is not set. A GPU is busy with that
many; a forward keeps no activations, so memory follows one layer (`selfplay plan`)."""


class NamedModel(ModelRef):
    """A scorer's model. A key contains the content of a local directory, or the id and revision of a hub model."""

    def identity(self) -> dict[str, Any]:
        if self.path is None or not Path(self.path).expanduser().is_dir():
            return super().identity()
        return {"content": model_content(Path(self.path).expanduser())}


class ModelScorerConfig(Named):
    """Settings of every scorer with weights of its own."""

    model: NamedModel
    dtype: Dtype = "auto"
    """Arithmetic of its passes. auto: 16 bits on a GPU (float16 for PairRM, bfloat16 for others, where the GPU has it),
    else float32, which is slower and the same on every machine up to the last bits."""

    def identity(self) -> dict[str, Any]:
        """The settings; `auto` counts as float32, its meaning before, since both make the same choices."""
        fields = super().identity()
        return fields | ({"dtype": "float32"} if fields["dtype"] == "auto" else {})


def local_directory(model: ModelRef, scorer: str) -> Path | None:
    """Return the directory of a model named by path, None for one on the hub. Needs no network.

    Raises: ConfigError if the directory is no model.
    """
    if model.path is None:
        return None
    directory = Path(model.path).expanduser()
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"the scorer {scorer} needs a model in {directory}, which has no config.json: "
            "give `model: {path: ...}` of a Hugging Face directory, or `hub_id:`"
        )
    return directory


def locate(model: ModelRef, scorer: str) -> Path:
    """The model's directory; a hub model is fetched into the hub's own cache. Raises: ConfigError, TransientError."""
    return local_directory(model, scorer) or model_directory(model)


class ModelScorer(Scorer):
    """Base of scorers by one model, `config.model`. A missing directory is refused before anything is sampled."""

    ON_GPU: ClassVar[Dtype] = "bfloat16"
    """What `dtype: auto` means on a GPU."""
    TASK: ClassVar[str] = ""
    """What the model is loaded as, see `Scorer.models`."""

    @classmethod
    def models(cls, config: Any) -> list[tuple[ModelRef, str]]:
        return [(config.model, cls.TASK)]

    @classmethod
    def check_prompts(cls, config: Any, prompts: Sequence[PromptRow]) -> None:
        local_directory(config.model, config.name)

    def arithmetic(self) -> str:
        """Return the dtype of the passes; for `auto` what the device is good at."""
        if self.config.dtype != "auto":
            return self.config.dtype
        if pick_device(self.device) == "cpu":
            return "float32"
        if self.ON_GPU == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "float32"
        return self.ON_GPU

    def tokens_per_forward(self) -> int:
        """Return the padded tokens of a forward: the setting, else what the device wants."""
        if self.services.batch_tokens is not None:
            return self.services.batch_tokens
        return DEFAULT_TOKENS if pick_device(self.device) == "cpu" else GPU_TOKENS


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without old position buffers. Raises: ConfigError if there are none."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= load_file(path)
        except Exception as error:  # safetensors raises a class of its own
            raise ConfigError(f"{path} is not a readable safetensors file ({error}): fetch it again") from None
    if not tensors:
        raise ConfigError(f"{directory} has no *.safetensors weights (pickled .bin files are not read)")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Fill the network: all of its tensors come from the checkpoint, and all tensors of the checkpoint go into it.

    Raises: ConfigError naming the first that are missing, unknown or of another shape: a scorer with random parts gives
    random scores.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    common = [name for name in expected if name in shapes]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} {shapes[name]}, not {expected[name]}" for name in common if shapes[name] != expected[name]
        ],
    }
    if any(problems.values()):
        summary = "; ".join(f"{len(names)} {problem}, e.g. {names[:3]}" for problem, names in problems.items() if names)
        raise ConfigError(
            f"the checkpoint {directory} does not fit this network: {summary}. It is another model, or damaged"
        )
    network.load_state_dict(dict(tensors), strict=True)


def read_in_float32(head: nn.Module) -> None:
    """Make a network's head compute in float32, whatever the dtype before it.

    It costs nothing, and a score of 20 in bfloat16 would be a multiple of 1/8: candidates would tie.
    """
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


def refuse_remote_code(config: Mapping[str, Any], directory: Path, allowed: bool) -> None:
    """Raises: ConfigError for a model that brings its own Python, unless that is switched on."""
    if config.get("auto_map") and not allowed:
        raise ConfigError(
            f"the model {directory} brings Python code of its own ({', '.join(map(str, config['auto_map']))}). "
            "It is not run unless "
            "scorer.trust_remote_code is true; ArmoRM has a native scorer: {name: armorm}"
        )
