"""Flows - what trackers of experiments show of a run beside its numbers: tags, a description, its data; and whether
they have the whole run already."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Literal

from data_contracts.checkpoint import ModelRef
from data_contracts.files import write_atomic
from data_contracts.identity import digest_text
from data_contracts.mirror import MIRROR
from data_contracts.store import Store
from flows.config import RunConfig
from flows.preflight import Checked
from stages.running.hardware import hardware
from tasks.data.prompt_set import PromptSet
from tasks.data.source import Source
from tasks.trackers import Data, Described, mlflow_database, mlflow_uri

COMPLETE = "complete.txt"
"""File beside a run's report, there while the last session of the run ended whole: digest of its settings and of the
MLflow that has it."""


def note_complete(config: RunConfig, store: Store) -> None:
    """Write that a session of the run has ended, with everything built, reported and mirrored."""
    write_atomic(store.run_directory(config.name) / COMPLETE, _complete_as(config, store))


def forget_complete(config: RunConfig, store: Store) -> None:
    """Have the run count as not complete, as a session begins."""
    (store.run_directory(config.name) / COMPLETE).unlink(missing_ok=True)


def is_noted_complete(config: RunConfig, store: Store) -> bool:
    """Whether playing the run again would tell nobody anything new, as far as its artifacts are still there.

    Not so with a Prefect server of the user's, with other trackers than MLflow, with a mirror of the store, or where
    MLflow is another one now or has lost its database.
    """
    if config.tracking.chosen() or os.environ.get("PREFECT_API_URL") or os.environ.get(MIRROR):
        return False
    database = mlflow_database(store)
    if mlflow_uri(store) == f"sqlite:///{database}" and not database.is_file():
        return False
    with suppress(OSError, ValueError):
        note = (store.run_directory(config.name) / COMPLETE).read_text(encoding="utf-8")
        return note == _complete_as(config, store)
    return False


def _complete_as(config: RunConfig, store: Store) -> str:
    return f"{digest_text(config.model_dump_json())}\n{digest_text(mlflow_uri(store))}\n"


def described(config: RunConfig, checked: Checked) -> Described:
    """Return what MLflow and the others show of a run: method, policy, data, seed, commit and hardware as tags."""
    prompts = config.prompts
    tags = {
        "method": config.method.name,
        "policy": _model(config.policy),
        "data": _source(prompts.train_source),
        "seed": str(config.seed),
        "hardware": hardware(),
    }
    if config.weights.name != "ones":
        tags["weights"] = config.weights.name
    if config.models.teacher is not None:
        tags["teacher"] = _model(config.models.teacher)
    if commit := _commit():
        tags["commit"] = commit
    heldout = prompts.heldout_source or prompts.train_source
    data = (_data("training", prompts.train_source, checked.train), _data("heldout", heldout, checked.heldout))
    return Described(config.model_dump(mode="json"), tags, _note(config, tags, checked), data)


def _data(context: Literal["training", "heldout"], source: Source, prompts: PromptSet) -> Data:
    name = _source(source)
    return Data(context, Path(name).name, prompts.digest, name, len(prompts))


def _note(config: RunConfig, tags: dict[str, str], checked: Checked) -> str:
    """Return the description, as Markdown."""
    rounds = f"{config.iterations} iterations" if config.iterations > 1 else "1 iteration"
    lines = [
        f"**{config.name}**: {rounds} of {tags['method']} on {tags['policy']}, "
        f"{len(checked.train)} training prompts of {tags['data']}, {len(checked.heldout)} held-out prompts.",
        "",
        "Curves over the iteration: `heldout_score` and what else the report's table has. Curves over the optimizer "
        "steps of all iterations: `curve/loss`, `curve/rewards/margins` ... The child runs have each iteration's own.",
        "",
        f"`selfplay report {config.name}` writes the page again.",
    ]
    return "\n".join(lines)


def _model(model: ModelRef) -> str:
    name = model.path or model.hub_id or ""
    return f"{name} @ {model.revision}" if model.revision else name


def _source(source: Source) -> str:
    """Return the path of a source, the name of a data set, or the parts of a mix."""
    return source.path or source.hub_id or " + ".join(_source(share.source) for share in source.mix)


def _commit() -> str:
    """Return the commit of this checkout, with -dirty if files have changed since; "" where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""
