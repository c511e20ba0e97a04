"""Tasks - a model that the user named -> a checked directory and an input of stages, addressed by its content."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef, check_model_directory, external_model, header_of, weight_files
from data_contracts.identity import digest_file, digest_text
from data_contracts.store import Store
from stages.models.hub import model_directory


class LoadedModel(NamedTuple):
    """A model that a run will load."""

    directory: Path
    task: str
    """What it is loaded as: stages/models/architecture.py."""

    def digests(self) -> list[list[str]]:
        """Return name and digest of all that says which tensors there must be, and which there are."""
        paths = sorted(path for path in self.directory.iterdir() if path.suffix == ".json")
        headers = [[path.name, digest_text(header_of(path))] for path in weight_files(self.directory)]
        return [[path.name, digest_file(path)] for path in paths] + headers


def locate(model: ModelRef, chat_template: bool) -> Path:
    """The model's directory, with everything in it that engines need; a hub model is fetched first.

    Raises: ConfigError for a model that is not there or not complete, TransientError if the hub cannot be reached.
    """
    directory = model_directory(model)
    check_model_directory(directory, chat_template)
    return directory


def resolve(model: ModelRef, chat_template: bool, store: Store) -> ArtifactRef:
    """The model as an input of stages; its digest is remembered in the store."""
    return external_model(locate(model, chat_template), store.root / "digests")
