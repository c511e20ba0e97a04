"""Tasks - a model that the user named -> a checked directory and an input of stages, addressed by its content."""

from __future__ import annotations

from pathlib import Path

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef, check_model_directory, external_model
from data_contracts.store import Store
from stages.models.hub import model_directory


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
