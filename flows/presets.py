"""Flow - self-play as deployments offer it: a flow for each run config of deploy/runs, and one for your own files.

`flows/presets.py:sppo` is deploy/runs/sppo.yaml (other characters than letters and digits become _). Its parameters are
the settings of the run with the file's values, as Prefect's run form shows them; `own` takes a file of yours.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from prefect import Flow, flow
from pydantic import WithJsonSchema

from data_contracts.store import Store
from flows.config import load_run
from flows.form import changes, form_values, run_schemas
from flows.run import flow_run_name, given_name, run_self_play
from flows.train_once import check_given_responses
from stages.scoring.pairing import PAIRINGS

RUNS = Path("deploy", "runs")
"""In the working directory, as every path that a run config names: Prefect starts a run in SELFPLAY_HOME."""
CONFIG = {"type": "string", "description": "Path of your run config, relative to the checkout or absolute."}
OVERRIDES = {
    "type": "object",
    "description": 'Single settings by dotted name, e.g. {"training.learning_rate": 1e-6}; laid over everything else.',
    "additionalProperties": True,
    "default": {},
}
STORE = {
    "anyOf": [{"type": "null"}, {"type": "string"}],
    "description": "Directory of the artifact store. None: SELFPLAY_STORE, else ./store.",
    "default": None,
}


def __getattr__(name: str) -> Flow[..., dict[str, Any]]:
    """The flow of a run config in deploy/runs. Raises: AttributeError if there is none of this name."""
    if name == "own":
        return _own_flow()
    for path in RUNS.glob("*.yaml"):
        if re.sub(r"\W", "_", path.stem) == name:
            return preset_flow(path)
    raise AttributeError(f"no run config in {RUNS.absolute()} is called {name}")


def preset_flow(path: Path) -> Flow[..., dict[str, Any]]:
    """Return the flow that plays the run config at `path`, with single fields changed by its parameters."""
    preset = load_run(path)
    is_training_once = not PAIRINGS.get(preset.pairing).candidates
    forced = {"iterations": 1} if is_training_once else {}
    values: dict[str, Any] = form_values(preset) | forced

    def play(*arguments: Any, **parameters: Any) -> dict[str, Any]:
        given = signature.bind(*arguments, **parameters).arguments
        overrides, store = given.pop("overrides", None), given.pop("store", None)
        config = load_run(path, overrides, forced | changes(given, values))
        if is_training_once:
            check_given_responses(config, str(path))
        return run_self_play(config, Store(store))

    signature = _signature(run_schemas(values) | {"overrides": OVERRIDES, "store": STORE})
    flow_name = "train-once" if is_training_once else "self-play"
    return _as_flow(play, signature, flow_name, lambda: given_name() or values["name"])


def _own_flow() -> Flow[..., dict[str, Any]]:
    """Return the flow that plays any run config: what is given replaces single fields of the file."""

    def play(*arguments: Any, **parameters: Any) -> dict[str, Any]:
        given = signature.bind(*arguments, **parameters).arguments
        path, overrides, store = given.pop("config"), given.pop("overrides", None), given.pop("store", None)
        filled = {name: value for name, value in given.items() if value is not None}
        return run_self_play(load_run(path, overrides, filled), Store(store))

    schemas = {"config": CONFIG} | run_schemas(None) | {"overrides": OVERRIDES, "store": STORE}
    signature = _signature(schemas)
    return _as_flow(play, signature, "self-play", flow_run_name)


def _signature(schemas: Mapping[str, dict[str, Any]]) -> inspect.Signature:
    """Return a signature whose parameters have these schemas; one without a default is required."""
    parameters: list[inspect.Parameter] = []
    for name, schema in schemas.items():
        schema = dict(schema)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=schema.pop("default", inspect.Parameter.empty),
                annotation=Annotated[Any, WithJsonSchema(schema)],
            )
        )
    return inspect.Signature(parameters)


def _as_flow(
    play: Callable[..., dict[str, Any]], signature: inspect.Signature, name: str, run_name: Callable[[], str]
) -> Flow[..., dict[str, Any]]:
    cast(Any, play).__signature__ = signature
    return flow(name=name, flow_run_name=run_name, persist_result=False)(play)
