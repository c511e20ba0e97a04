"""Flow - a self-play run as Prefect sees it: parameters, checks, the loop with building hands, report and costs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.ledger import Ledger, cost_rows, format_table, read_account, sum_rows
from data_contracts.redaction import redact_output
from data_contracts.store import RUN_SETTINGS, Store
from flows import hands
from flows.config import RunConfig, load_run, read_run
from flows.preflight import models_of, preflight
from flows.report.history import History
from flows.report.prefect_pages import PrefectPages
from flows.self_play import SelfPlay
from flows.tournament import merged
from flows.tracked import described, forget_complete, note_complete
from stages.evaluation.promotion import Measurement
from stages.running.cost import process_start
from tasks.data.prompt_set import PromptSet
from tasks.execution.engines import executor_for
from tasks.place import Place
from tasks.stages import prompts_task, run
from tasks.trackers import Mirrors
from tasks.tracking import Tracker
from tasks.writers import other_mirrors

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


def given_name() -> str | None:
    """Return the run's name as the flow run's parameters say it, if they do."""
    parameters = flow_run.parameters
    return (parameters.get("overrides") or {}).get("name") or parameters.get("name")


def flow_run_name() -> str:
    """Return the run's name: as a parameter says, else the run config, else the name of its file."""
    if name := given_name():
        return name
    path = Path(flow_run.parameters["config"])
    with suppress(ConfigError):  # the flow itself says what is wrong with the file
        return str(read_run(path).get("name", path.stem))
    return path.stem


@flow(name="self-play", flow_run_name=flow_run_name, persist_result=False)
def self_play(config: str, overrides: dict[str, Any] | None = None, store: str | None = None) -> dict[str, Any]:
    """Run self-play from a YAML file. Deployments have a form for each file: flows/presets.py.

    Args:
        config: Path of the run config, relative to the checkout or absolute.
        overrides: Single settings by dotted name, e.g. {"training.learning_rate": 1e-6}.
        store: Directory of the artifact store; default SELFPLAY_STORE, else ./store.
    """
    return run_self_play(load_run(config, overrides), Store(store))


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
    about = described(config, checked)
    mlflow = Tracker(store, config.name, logger.warning, described=about)
    tracker = Mirrors([mlflow, *other_mirrors(config.tracking, store, config.name, about, logger.warning)])
    pages = PrefectPages(config.name, logger)
    history = History(config, store, tracker, pages)
    if checked.data is not None:
        history.data = checked.data.lines()
        logger.log(logging.WARNING if checked.data.drops_over_a_third else logging.INFO, checked.data.summary())
    forget_complete(config, store)
    keep_settings(config, store)
    store.sweep()  # a run that finds everything built tidies up too
    ledger = Ledger(store, config.name)
    # Imports belong to the run where the process was made for it: by the command line, or by a worker.
    is_own = OWN_PROCESS in os.environ or "PREFECT__FLOW_RUN_ID" in os.environ
    ledger.begin(process_start() if is_own else None)
    place = Place(str(store.root), config.name, session=ledger.session, execution=config.execution)
    loop = SelfPlay(config, checked, start, models, BuildingHands(), history)
    try:
        final = loop.play(place)
    except BaseException:
        tracker.finish(None, "FAILED")
        raise
    report = history.write_report(plots=True)
    pages.finish(report)
    tracker.register({"best": history.best or loop.start, "final": final})
    tracker.finish(report)
    ledger.end()
    _show_costs(config.name, store)
    logger.info("report: %s", report)
    if where := mlflow.where():
        logger.info("MLflow: %s", where)
    if loop.unanswered is not None:
        raise loop.unanswered
    if mlflow.working:
        note_complete(config, store)
    return {
        "final": final.path,
        "report": str(report),
        "headline": history.headline(),
        "rows": history.rows,
        "session": ledger.session,
    }
