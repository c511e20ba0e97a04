"""Tasks - the Prefect tasks: one for every stage, shown as Cached when its artifact was there, and one for prompts."""

from __future__ import annotations

import sys
import time
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from tqdm import tqdm

from data_contracts.artifact import ArtifactRef
from data_contracts.config import Config
from data_contracts.errors import TransientError
from data_contracts.ledger import Ledger
from data_contracts.store import Store
from tasks.build import Built, build
from tasks.data.prompt_set import PromptSet
from tasks.launch import Progress
from tasks.place import Place
from tasks.prompts import publish


def _worth_another_try(task: Any, run: Any, state: Any) -> bool:
    """Whether to try again: only after a lost process or an unreachable server. Finished shards make that cheap."""
    return isinstance(state.result(raise_on_failure=False), TransientError)


@task(
    name="stage",
    task_run_name="{name}-{place.step}",
    cache_policy=NO_CACHE,  # one truth: the store's records decide
    persist_result=False,
    retries=1,
    retry_delay_seconds=2,
    retry_condition_fn=_worth_another_try,
)
def stage_task(stage: str, config: Config, inputs: dict[str, ArtifactRef], place: Place, name: str) -> Any:
    """Build one artifact and show it in the run's view."""
    logger, store = get_run_logger(), Store(place.store)
    ledger, began = Ledger(store, place.run, place.session), time.time()
    ledger.started(place.step, name, stage)
    artifact = _ProgressArtifact(f"{place.run}-{place.step.replace('_', '-')}-{name}", f"{stage} of {place.step}")
    with _TerminalBar(f"{place.step} {stage}") as bar:

        def on_progress(progress: Progress) -> None:
            artifact(progress)
            bar(progress)

        built = build(
            stage,
            config,
            inputs,
            store,
            logger.info,
            on_progress,
            place.execution,
        )
    store.show_in_run(place.run, place.step, name, built.ref)
    ledger.finished(place.step, name, stage, built.record, built.cached, began, built.waited)
    if built.cached:
        return Completed(name="Cached", message=f"found {built.ref}", data=built)
    logger.info("%s built in %.1f s: %s", built.ref, built.record.seconds["wall"], built.ref.path)
    return built


def run(stage: str, config: Config, place: Place, **inputs: ArtifactRef) -> Built:
    """Build one artifact through the Prefect task. The task may return a State, which Prefect hands back as it is."""
    return stage_task(stage, config, inputs, place, place.name_of(stage), return_state=True).result()


@task(name="prompts", task_run_name="{name}-{place.step}", cache_policy=NO_CACHE, persist_result=False)
def prompts_task(prompts: PromptSet, place: Place, name: str) -> ArtifactRef:
    """Publish prompts and show them in the run's view."""
    store = Store(place.store)
    ref = publish(prompts, store)
    store.show_in_run(place.run, place.step, name, ref)
    return ref


class _TerminalBar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, description: str):
        self.description = description
        self.bar: tqdm | None = None

    def __enter__(self) -> _TerminalBar:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, progress: Progress) -> None:
        if not sys.stderr.isatty():
            return
        # Until a stage knows how much it has to do, a rate and a count would be question marks.
        bar_format = None if progress.total else "{desc}: starting, {elapsed}"
        if self.bar is None:
            self.bar = tqdm(desc=self.description, leave=False, bar_format=bar_format)
        self.bar.total, self.bar.unit = progress.total or None, progress.unit or "it"
        self.bar.bar_format = bar_format
        self.bar.update(progress.done - self.bar.n)
        self.bar.refresh()


class _ProgressArtifact:
    """Progress in the Prefect UI, at most every two seconds. An unreachable server costs the bar, not the run."""

    def __init__(self, key: str, description: str):
        self.key, self.description = key, description
        self.artifact: Any = None
        self.shown, self.next = -1, 0.0

    def __call__(self, progress: Progress) -> None:
        if (
            not progress.total
            or progress.done == self.shown
            or (time.monotonic() < self.next and progress.done < progress.total)
        ):
            return
        self.shown, self.next = progress.done, time.monotonic() + 2
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(
                    progress=progress.percent, key=self.key, description=self.description
                )
            else:
                update_progress_artifact(artifact_id=self.artifact, progress=progress.percent)
        except Exception as error:  # whatever the client raises: a bar is never worth a run
            get_run_logger().debug("no progress artifact: %s", error)
