"""Flow - a self-play run as Prefect sees it: parameters, checks, the loop with building hands, report and costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from pydantic import BaseModel

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef
from data_contracts.files import write_atomic
from data_contracts.ledger import Ledger, cost_rows, format_table, read_account, sum_rows
from data_contracts.redaction import redact_output
from data_contracts.store import RUN_SETTINGS, Store
from flows import hands
from flows.config import (
    EvaluationConfig,
    ExecutionConfig,
    PromptsConfig,
    RunConfig,
    SamplingConfig,
    ScoringConfig,
    TrainingConfig,
    WeightingConfig,
    load_run,
)
from flows.preflight import models_of, preflight
from flows.report.history import History
from flows.report.prefect_pages import PrefectPages
from flows.self_play import SelfPlay
from flows.tournament import merged
from stages.evaluation.promotion import Measurement
from stages.methods import METHODS
from stages.registry import Named
from tasks.data.prompt_set import PromptSet
from tasks.execution.engines import executor_for
from tasks.place import Place
from tasks.stages import prompts_task, run
from tasks.tracking import Tracker

OWN_PROCESS = "SELFPLAY_OWN_PROCESS"
"""Environment variable the CLI sets: this process serves a single run."""


class BuildingHands:
    """Hands that build through Prefect tasks."""

    run = staticmethod(run)

    def publish(self, prompts: PromptSet, place: Place) -> ArtifactRef:
        return prompts_task(prompts, place, place.name_of("prompts"))

    def merge(self, players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
        return merged(players, Store(place.store))

    def read_answers(self, answers: ArtifactRef) -> dict[str, str]:
        return hands.read_answers(answers)

    def read_report(self, report: ArtifactRef) -> Measurement:
        return hands.read_report(report)


def flow_run_name() -> str:
    """Return the run's name: the parameter, else the file name of the run config."""
    parameters = flow_run.parameters
    return parameters.get("name") or Path(parameters["config"]).stem


@flow(name="self-play", flow_run_name=flow_run_name, persist_result=False)
def self_play(
    config: str = "deploy/runs/quickstart.yaml",
    name: str | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    policy: ModelRef | None = None,
    prompts: PromptsConfig | None = None,
    method: Annotated[Named, METHODS] | None = None,
    sampling: SamplingConfig | None = None,
    scoring: ScoringConfig | None = None,
    weighting: WeightingConfig | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    execution: ExecutionConfig | None = None,
    overrides: dict[str, Any] | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Run self-play from a YAML file; whatever else is given replaces that section of it.

    Args:
        config: Path of the run config, relative to the checkout or absolute.
        name: Another name for the run.
        iterations: Rounds of sample, score, weigh, train.
        seed: Another seed.
        policy: Another start model.
        prompts: Other prompt files.
        method: Another method, e.g. {"name": "dpo", "beta": 0.1}.
        sampling: Replaces the whole section.
        scoring: Replaces the whole section.
        weighting: Replaces the whole section.
        training: Replaces the whole section.
        evaluation: Replaces the whole section.
        execution: Replaces the whole section; changes no artifact.
        overrides: Single settings by dotted name, e.g. {"training.learning_rate": 1e-6}.
        store: Directory of the artifact store; default SELFPLAY_STORE, else ./store.
    """
    sections = {
        "name": name,
        "iterations": iterations,
        "seed": seed,
        "policy": policy,
        "prompts": prompts,
        "method": method,
        "sampling": sampling,
        "scoring": scoring,
        "weighting": weighting,
        "training": training,
        "evaluation": evaluation,
        "execution": execution,
    }
    changes = {key: _plain(value) for key, value in sections.items() if value is not None}
    resolved = load_run(config, changes | (overrides or {}))
    return run_self_play(resolved, Store(store))


def _plain(value: Any) -> Any:
    """Return a section as the fields that were set, any other parameter as it is."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return value


def keep_settings(config: RunConfig, store: Store) -> None:
    """Write the resolved settings to `runs/<name>/run.json`, by which `resume`, `status` and `report` find them."""
    path = store.run_directory(config.name) / RUN_SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, config.model_dump_json(indent=1) + "\n")


def _show_costs(name: str, store: Store) -> None:
    """Send the costs by iteration and stage to Prefect as a table. MLflow has the figures of each record already."""
    by = ("step", "stage")
    head, cells = format_table(sum_rows(cost_rows(read_account(store, name)), by), by)
    try:
        create_table_artifact(
            [dict(zip(head, line, strict=True)) for line in cells], key=f"{name}-costs", description=f"what {name} cost"
        )
    except Exception as error:  # a server that does not answer costs the table, not the run
        get_run_logger().warning("the costs could not be sent to Prefect: %s", error)


def run_self_play(config: RunConfig, store: Store) -> dict[str, Any]:
    """Check the request, play, write the report. Needs a flow run around it. Returns what the flow returns.

    Raises: TransientError, after everything else is done, if the tournament's judge did not answer.
    """
    redact_output()
    logger = get_run_logger()
    checked = preflight(config, store)
    # Refuses a pool or a cluster that is not reachable, before anything is written.
    executor_for(config.execution, store, logger.info, [])
    start, models = models_of(config, store)
    if config.live_reference:
        logger.info("%s holds the reference model in memory beside the policy while it trains", config.method.name)
    tracker = Tracker(store, config.name, logger.warning)
    tracker.parameters(config.model_dump(mode="json"))
    history = History(config, store, tracker, PrefectPages(config.name, logger))
    if checked.data is not None:
        history.data = checked.data.lines()
        logger.info("\n".join(history.data))
    keep_settings(config, store)
    store.sweep()  # a run that finds everything built tidies up too
    ledger = Ledger(store, config.name)
    # Imports belong to the run where the process was made for it: by the command line, or by a worker.
    is_own = OWN_PROCESS in os.environ or "PREFECT__FLOW_RUN_ID" in os.environ
    ledger.begin(psutil.Process().create_time() if is_own else None)
    place = Place(str(store.root), config.name, session=ledger.session, execution=config.execution)
    loop = SelfPlay(config, checked, start, models, BuildingHands(), history)
    try:
        final = loop.play(place)
    except BaseException:
        tracker.finish(None, "FAILED")
        raise
    report = history.write_report(plots=True)
    tracker.register({"best": history.best or start, "final": final})
    tracker.finish(report)
    ledger.end()
    _show_costs(config.name, store)
    logger.info("report: %s", report)
    if loop.unanswered is not None:
        raise loop.unanswered
    return {
        "final": final.path,
        "report": str(report),
        "headline": history.headline(),
        "rows": history.rows,
        "session": ledger.session,
    }
