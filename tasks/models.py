"""Tasks - a model that the user named -> a checked directory and an input of stages, addressed by its content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from data_contracts.adapter import BASE, adapter_alone, base_content
from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import (
    HUB_ID,
    MODEL_SUFFIXES,
    WEIGHTS_INDEX,
    ModelRef,
    check_model_directory,
    external_model,
    header_of,
    weight_files,
)
from data_contracts.errors import ConfigError
from data_contracts.identity import digest_file, digest_text
from data_contracts.installation import import_paths
from data_contracts.store import Store
from stages.models.hub import base_directory, model_directory

MERGED = "merged"
"""Directory of the store for adapters that runs name as models, merged into their base models."""


def model_named(text: str) -> ModelRef:
    """Return the model that a directory or a hub id names. Raises: ConfigError for a text that is neither."""
    path = Path(text).expanduser()
    if path.exists():
        return ModelRef(path=text)
    if not HUB_ID.fullmatch(text):
        raise ConfigError(
            f"the model {text!r} is neither a directory ({path.absolute()} does not exist) nor owner/name of the hub; in a "
            "checkout `make model` fetches the quickstart's"
        )
    return ModelRef(hub_id=text)


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
    """The model's directory, with everything in it that engines need; a hub model is fetched first. Of an adapter it is
    the base model's: of the same shape, and its tokenizer is the one that counts.

    Raises: ConfigError for a model that is not there or not complete, TransientError if the hub cannot be reached.
    """
    directory = model_directory(model)
    if (adapter := adapter_alone(directory)) is not None:
        directory = base_directory(adapter)
    check_model_directory(directory, chat_template)
    return directory


def resolve(model: ModelRef, chat_template: bool, store: Store) -> ArtifactRef:
    """The model as an input of stages; its digest is remembered in the store. An adapter is merged into its base first."""
    whole = locate(model, chat_template)
    if (adapter := adapter_alone(model_directory(model))) is not None:
        whole = merged(whole, adapter, store)
    return external_model(whole, store.root / "digests")


def merged(base: Path, adapter: Path, store: Store) -> Path:
    """Return the directory in the store of a model with an adapter added to it, made unless it is there.

    Raises: ConfigError for an adapter of another model.
    """
    cache = store.root / "digests"
    base_digest = external_model(base, cache).content
    if (adapter / BASE).is_file() and base_content(adapter) != base_digest:
        raise ConfigError(f"the adapter in {adapter} belongs to another model than {base}: its {BASE} says so")
    out = store.root / MERGED / digest_text(base_digest + external_model(adapter, cache).content)[:16]
    with store.lock(MERGED, out.name):
        if not out.is_dir():
            work = out.with_name(f"{out.name}.tmp-{os.getpid()}")
            command = [sys.executable, "-m", "stages.models.adapters", str(base), str(adapter), str(work)]
            environment = os.environ | import_paths()
            process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            if process.returncode:
                shutil.rmtree(work, ignore_errors=True)
                raise ConfigError(
                    process.stdout.strip() or f"merging {adapter} into {base} failed; its output is above"
                )
            for path in base.iterdir():  # tokenizer, template, generation settings
                is_weights = path.suffix == ".safetensors" or path.name == WEIGHTS_INDEX
                if path.suffix in MODEL_SUFFIXES and not is_weights and not (work / path.name).exists():
                    shutil.copyfile(path, work / path.name)
            os.replace(work, out)
    return out
