"""Stages - a model that the user named -> its directory on this disk. Only this module downloads from the hub."""

from __future__ import annotations

from pathlib import Path

from data_contracts.adapter import named_base
from data_contracts.checkpoint import ModelRef
from data_contracts.config import parse
from data_contracts.errors import ConfigError, TransientError

FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is fetched of a repository: weights without pickles, settings, tokenizer."""


def model_directory(model: ModelRef) -> Path:
    """The directory of a model; one on the hub is fetched into the hub's own cache first.

    A directory named by `path` is returned as it is: whoever reads it checks it. Raises: ConfigError for a model that
    the hub does not have, TransientError if the hub cannot be reached and the cache does not hold the model.
    """
    if model.path is not None:
        return Path(model.path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(str(model.hub_id), revision=model.revision, allow_patterns=FETCHED))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"the hub has no model {model.hub_id} at revision {model.revision or 'main'}, or it is gated: "
            f"{_first_line(error)}. Check `hub_id` and `revision`, or give `path:` of a directory"
        ) from None
    except (OSError, ValueError) as error:  # every error of the hub's client is an OSError, whatever the network did
        raise TransientError(
            f"the model {model.hub_id} could not be fetched and is not in the local cache: {_first_line(error)}. "
            "Give `path:` of a directory instead"
        ) from None


def base_directory(adapter: Path) -> Path:
    """The directory of an adapter's base model; one on the hub is fetched. Raises: as `model_directory`, and ConfigError
    for an adapter that cannot be merged.
    """
    base = named_base(adapter)
    if base.path is not None:
        return base.path
    return model_directory(
        parse(ModelRef, {"hub_id": base.hub_id, "revision": base.revision}, f"the base of {adapter}")
    )


def directory_here(model: ModelRef) -> Path | None:
    """The directory of a model that is on this disk; None for one of the hub that was not fetched yet. Asks no network."""
    if model.path is not None:
        return Path(model.path).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model.hub_id), revision=model.revision, allow_patterns=FETCHED, local_files_only=True)
        )
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
