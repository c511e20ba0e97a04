"""Stages - a scorer's model: where it lies, what it is in a key, and strict loading of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_contracts.checkpoint import ModelRef, external_model
from data_contracts.errors import ConfigError, TransientError
from data_contracts.store import Store
from stages.registry import Named

Dtype = Literal["float32", "bfloat16", "float16"]


class NamedModel(ModelRef):
    """A scorer's model. In an artifact's key a local directory counts by the content of its files, a hub model by id and revision."""

    def identity(self) -> dict[str, Any]:
        if self.path is None or not Path(self.path).expanduser().is_dir():
            return super().identity()
        store = Store()
        return {
            "content": external_model(
                Path(self.path).expanduser(), store.root / "digests" if store.root.is_dir() else None
            ).content
        }


class ModelScorerConfig(Named):
    """What every scorer with weights of its own says."""

    model: NamedModel
    dtype: Dtype = "float32"
    """Arithmetic of its passes; float32 is slower, and the same on every machine to the last bits but one."""


def local_directory(model: ModelRef, scorer: str) -> Path | None:
    """The directory of a model named by path, None for one on the hub. Needs no network. Raises: ConfigError if it is not there."""
    if model.path is None:
        return None
    directory = Path(model.path).expanduser()
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"the scorer {scorer} wants a model in {directory}, which has no config.json. Give `model: {{path: ...}}` or `hub_id:`"
        )
    return directory


def locate(model: ModelRef, scorer: str) -> Path:
    """The model's directory; a hub model is fetched into the hub's own cache. Raises: ConfigError, TransientError."""
    if (directory := local_directory(model, scorer)) is not None:
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model.hub_id, revision=model.revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"the hub has no model {model.hub_id} at {model.revision or 'main'}: {str(error).splitlines()[0]}"
        ) from None
    except (OSError, ValueError) as error:
        raise TransientError(
            f"the model {model.hub_id} of the scorer {scorer} could not be fetched and is not in the local cache: {str(error).splitlines()[0]}"
        ) from None


class ModelScorer:
    """Base of scorers by one model, `config.model`, that need nothing of the start model: refused early if it is a directory that is not there."""

    @staticmethod
    def needs_start_logps(config: Any) -> bool:
        return False

    @staticmethod
    def check_prompts(config: Any, prompts: Sequence[dict[str, Any]]) -> None:
        local_directory(config.model, config.name)


class PairScorer(ModelScorer):
    """Of those that compare candidates by twos."""

    @staticmethod
    def compares(config: Any) -> bool:
        return True


def read_tensors(directory: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, without the position buffers that old versions saved. Raises: ConfigError if there is none."""
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    tensors: dict[str, Any] = {}
    for path in files:
        try:
            tensors |= load_file(path)
        except Exception as error:  # safetensors raises a class of its own
            raise ConfigError(f"{path} is not a readable safetensors file ({error}): fetch it again") from None
    if not files and (directory / "pytorch_model.bin").is_file():
        import torch

        tensors = torch.load(directory / "pytorch_model.bin", map_location="cpu", weights_only=True)
    if not tensors:
        raise ConfigError(f"{directory} has no *.safetensors weights")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


def load_strictly(network: Any, tensors: Mapping[str, Any], directory: Path) -> None:
    """Every tensor of the network comes from the checkpoint, and every tensor of the checkpoint goes into the network.

    Raises: ConfigError naming the first that are missing, unknown or of another shape; a scorer with random parts says nothing.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {found[name]}, not {wanted[name]}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what}, e.g. {names[:3]}" for what, names in problems.items() if names)
        raise ConfigError(
            f"the checkpoint {directory} does not fit this network: {told}. It is another model, or damaged"
        )
    network.load_state_dict(dict(tensors), strict=True)


def refuse_remote_code(config: Mapping[str, Any], directory: Path, allowed: bool) -> None:
    """Raises: ConfigError for a model that brings its own Python, unless that is switched on."""
    if config.get("auto_map") and not allowed:
        raise ConfigError(
            f"the model {directory} brings Python code of its own ({', '.join(map(str, config['auto_map']))}). It is not run unless "
            "scorer.trust_remote_code is true; ArmoRM has a native scorer: {name: armorm}"
        )
