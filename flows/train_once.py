"""Flow - train once: an offline method on given pairs or ground truths.

The same tasks as self-play, for one iteration, without sampling.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from data_contracts.errors import ConfigError
from data_contracts.store import Store
from flows.config import RunConfig, load_run
from flows.run import flow_run_name, run_self_play
from stages.scoring.pairing import PAIRINGS


@flow(name="train-once", flow_run_name=flow_run_name, persist_result=False)
def train_once(
    config: str, overrides: dict[str, Any] | None = None, name: str | None = None, store: str | None = None
) -> dict[str, Any]:
    """Train on given responses from a YAML file whose `scoring.pairing` is `given` or `truth`.

    Args:
        config: Path of the run config, e.g. deploy/runs/tis_dpo_d.yaml.
        overrides: Single settings by dotted name, e.g. {"training.learning_rate": 1e-6}.
        name: Another name for the run.
        store: Directory of the artifact store; default SELFPLAY_STORE, else ./store.
    """
    run = load_run(config, {"iterations": 1} | (overrides or {}) | ({"name": name} if name else {}))
    check_given_responses(run, config)
    return run_self_play(run, Store(store))


def check_given_responses(run: RunConfig, config: str) -> None:
    """Raises: ConfigError if the run reads generations, which training once does not make. `config`: its file."""
    if PAIRINGS.get(run.pairing).candidates:
        usable = ", ".join(name for name in PAIRINGS.names() if not PAIRINGS.get(name).candidates)
        raise ConfigError(
            f"{config}: train-once trains on given responses, but scoring.pairing is {run.pairing}, which needs "
            f"generations: use the flow self-play, or set it to one of {usable}"
        )
