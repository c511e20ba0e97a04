"""Tasks - a model that the user named -> a directory on this disk, checked, addressed by its content."""

from __future__ import annotations

from pathlib import Path

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef, check_model_directory, external_model
from data_contracts.errors import ConfigError, TransientError
from data_contracts.store import Store


def locate(model: ModelRef, chat_template: bool) -> Path:
    """The model's directory; a hub model is fetched into the hub's own cache first. Raises: ConfigError, TransientError."""
    directory = Path(model.path).expanduser() if model.path is not None else _fetch(model)
    check_model_directory(directory, chat_template)
    return directory


def _fetch(model: ModelRef) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model.hub_id, revision=model.revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"the hub has no model {model.hub_id} at revision {model.revision or 'main'}, or it is gated: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TransientError(
            f"the model {model.hub_id} could not be fetched and is not in the local cache: {(str(error) or type(error).__name__).splitlines()[0]}. Give `path:` of a directory instead"
        ) from None


def resolve(model: ModelRef, chat_template: bool, store: Store) -> ArtifactRef:
    """The model as an input of stages."""
    return external_model(locate(model, chat_template), store.root / "digests")
