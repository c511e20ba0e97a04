"""Flow - self-play: improve a policy by preferring its own better completions, `iterations` times.

prompts -> sample -> score -> weigh -> train -> evaluate, and the checkpoint is the next policy
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from data_contracts.artifact import ArtifactRef
from data_contracts.checkpoint import ModelRef
from data_contracts.errors import TransientError
from data_contracts.ledger import Ledger, read, rows, table, total
from data_contracts.shards import read_shards
from data_contracts.store import RUN_SETTINGS, Store, content_digest, write_atomic
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
from flows.gate import Gate
from flows.preflight import Checked, preflight
from flows.report.history import History
from flows.tournament import merged, scoring_of, spread
from stages.evaluation.promotion import Measurement, select_checkpoint
from stages.methods import METHODS
from stages.registry import Named
from stages.scoring.stage import WITHOUT_GENERATIONS
from stages.training.batches import STEPS
from tasks.build import Built
from tasks.execution.engines import executor_for
from tasks.models import resolve
from tasks.prompts import part_of, select_prompts
from tasks.stages import Place, run
from tasks.tracking import Tracker

MOST_ITERATIONS = 8
"""Of a longer run, so many evenly spaced ones play in the tournament: its cost is quadratic."""


def read_answers(answers: ArtifactRef) -> dict[str, str]:
    return {row["prompt_id"]: row["completion"] for row in read_shards(answers.path, "generations").to_pylist()}


def read_report(report: ArtifactRef) -> Measurement:
    return Measurement.from_rows(
        read_shards(report.path, "heldout", "heldout").to_pylist(), read_shards(report.path, "eval_report").to_pylist()
    )


def merge(players: Mapping[str, ArtifactRef], place: Place) -> ArtifactRef:
    return merged(players, Store(place.store))


class Hands(NamedTuple):
    """What `play` does things with; a rehearsal (flows/forecast/rehearsal.py) has others, which only look."""

    run: Callable[..., Built] = run
    publish: Callable[..., ArtifactRef] = select_prompts
    read_answers: Callable[[ArtifactRef], dict[str, str]] = read_answers
    read_report: Callable[[ArtifactRef], Measurement] = read_report
    merge: Callable[[Mapping[str, ArtifactRef], Place], ArtifactRef] = merge


HANDS = Hands()
OWN_PROCESS = "SELFPLAY_OWN_PROCESS"
"""Environment: set by the command line, whose process is there for one run."""


def play(
    config: RunConfig,
    checked: Checked,
    place: Place,
    start: ArtifactRef,
    models: dict[str, ArtifactRef],
    history: Any,
    gate: Gate | None = None,
    hands: Hands = HANDS,
) -> ArtifactRef:
    """The algorithm. Every name is a finished artifact; nothing else is passed on."""
    run = hands.run
    heldout = hands.publish(checked.heldout, place, "heldout_prompts")

    answered: dict[str, ArtifactRef] = {}

    def measure(policy: ArtifactRef, place: Place) -> None:
        answers = run(
            "sample", config.sampling_for_heldout(), place, "heldout_generations", prompts=heldout, policy=policy
        )
        report = run(
            "evaluate", checked.evaluation, place, prompts=heldout, generations=answers.ref, policy=policy, start=start
        )
        history.measured(place, answers, report)
        answered[str(int(place.step.removeprefix("iter_")))] = answers.ref

    def best_checkpoint(trained: Built, place: Place) -> ArtifactRef:
        """Of those that the training kept, the one with the best held-out score (SPPO's rule)."""
        candidates, found = checkpoints_of(trained, config.training.checkpoints), []
        for number, policy in enumerate(candidates, start=1):
            shown_as = f"checkpoint_{number}_heldout_generations"
            answers = run("sample", config.sampling_for_heldout(), place, shown_as, prompts=heldout, policy=policy)
            inputs = {"prompts": heldout, "generations": answers.ref, "policy": policy, "start": start}
            found.append(
                hands.read_report(
                    run("evaluate", checked.evaluation.heldout_only(), place, f"checkpoint_{number}", **inputs).ref
                )
            )
        chosen, gains = select_checkpoint(found, config.evaluation.gate)
        history.selected(place, candidates, found, gains, chosen)
        return candidates[chosen]

    policy, previous = start, None
    measure(policy, place)
    for iteration in range(config.iterations):
        place = place._replace(step=f"iter_{iteration + 1:02d}")
        prompts = prompts_of(config, checked, iteration, place, models, hands)
        made: dict[str, Built] = {}
        inputs = {"prompts": prompts, "policy": policy, "start": start}
        if config.pairing not in WITHOUT_GENERATIONS:
            made["sample"] = run("sample", config.sampling_for_training(), place, prompts=prompts, policy=policy)
            inputs["generations"] = made["sample"].ref
        made["score"] = pairs = run("score", config.scoring_for_pairs(), place, **inputs)
        reference = policy if config.spec.REFERENCE == "iterate" else start
        made |= (helpers := auxiliary_models(config, place, pairs.ref, policy, models, hands.run))
        roles = (
            {"prompts": prompts, "reference": reference, "policy": policy}
            | models
            | {role: built.ref for role, built in helpers.items()}
        )
        made["weigh"] = weighted = run("weigh", config.weighting_for_pairs(), place, pairs=pairs.ref, **roles)
        extra = {"reference": reference} if config.live_reference else {}
        extra |= {"teacher": models["teacher"]} if "teacher_logits" in config.spec.needs(config.method) else {}
        if config.mix_previous and previous is not None:
            extra["more_pairs"] = run(
                "weigh", config.weighting_for_pairs(), place, "weigh_previous", pairs=previous, **roles
            ).ref
        made["train"] = trained = run(
            "train", config.training_for(iteration), place, pairs=weighted.ref, policy=policy, **extra
        )
        history.built(place, **made)
        previous = pairs.ref
        policy = best_checkpoint(trained, place) if config.training.checkpoints else trained.ref
        measure(policy, place)
        if gate is not None:
            policy, stop = gate.next(policy)
            if stop:
                break
    if config.evaluation.tournament is not None:
        names, scored = tournament(config, place, heldout, start, answered, hands)
        history.compared(config.evaluation.tournament.scorer.name, names, scored, len(checked.heldout))
    return policy if gate is None else gate.final(policy)


def tournament(
    config: RunConfig,
    place: Place,
    heldout: ArtifactRef,
    start: ArtifactRef,
    answered: Mapping[str, ArtifactRef],
    hands: Hands,
) -> tuple[list[str], Built | None]:
    """Everybody against everybody: the iterations' answers, and the baselines'. None: the judge is away, every comparison failed."""
    settings = config.evaluation.tournament
    players = {name: answered[name] for name in [list(answered)[i] for i in spread(len(answered), MOST_ITERATIONS)]}
    for name, model in settings.baselines.items():
        policy = resolve(model, config.sampling.template == "chat", Store(place.store))
        shown_as = f"{name}_heldout_generations"
        players[name] = hands.run(
            "sample", config.sampling_for_heldout(), place, shown_as, prompts=heldout, policy=policy
        ).ref
    inputs = {"prompts": heldout, "generations": hands.merge(players, place), "start": start}
    try:
        return list(players), hands.run("score", scoring_of(settings.scorer), place, "tournament", **inputs)
    except TransientError:
        return list(players), None


def checkpoints_of(trained: Built, parts: Sequence[float]) -> list[ArtifactRef]:
    """What a training left, in the order of its steps, the end last. One from the middle is addressed by its own files."""
    if trained.record is None:  # on paper
        return [trained.ref] * (len(parts) + 1)
    found, files = [], trained.record.files
    for name in sorted({file.name.split("/")[1] for file in files if file.name.startswith(f"{STEPS}/")}):
        below = f"{STEPS}/{name}/"
        own = [
            file.model_copy(update={"name": file.name.removeprefix(below)})
            for file in files
            if file.name.startswith(below)
        ]
        place = {"key": f"{trained.ref.key}/{STEPS}/{name}", "path": f"{trained.ref.path}/{STEPS}/{name}"}
        found.append(trained.ref.model_copy(update=place | {"content": content_digest(own)}))
    return [*found, trained.ref]


def prompts_of(
    config: RunConfig, checked: Checked, iteration: int, place: Place, models: dict[str, ArtifactRef], hands: Hands
) -> ArtifactRef:
    """The prompts of an iteration, with the teacher's answers as their responses where the run says so."""
    rows = part_of(
        checked.train, iteration, config.iterations, config.prompts.per_iteration, config.prompts.reuse, config.seed
    )
    prompts = hands.publish(rows, place)
    if not config.prompts.answers_from_teacher:
        return prompts
    # A seed of its own: from one seed, a teacher that is the start model would write what the policy is about to write.
    sampling = config.sampling_for_training().model_copy(update={"num_candidates": 1, "seed": config.seed + 1})
    texts = hands.read_answers(
        hands.run("sample", sampling, place, "teacher_answers", prompts=prompts, policy=models["teacher"]).ref
    )
    answered = [row | {"response": texts[row["prompt_id"]]} for row in rows if texts.get(row["prompt_id"], "").strip()]
    return hands.publish(answered, place, "prompts_with_answers")


def auxiliary_models(
    config: RunConfig,
    place: Place,
    pairs: ArtifactRef,
    policy: ArtifactRef,
    models: dict[str, ArtifactRef],
    run: Callable[..., Built],
) -> dict[str, Built]:
    """Train the positive, negative and reward models that nobody gave, on these pairs, from this policy: the same stages once more."""
    built: dict[str, Built] = {}
    training = config.auxiliary_training()
    for role in config.roles:
        if role in models:
            continue
        weighting = WeightingConfig(dtype=training.dtype, swap=role == "negative", runtime=config.weighting.runtime)
        weighted = run("weigh", weighting, place, f"{role}_pairs", pairs=pairs, reference=policy)
        built[role] = run("train", training, place, role, pairs=weighted.ref, policy=policy)
    return built


def flow_run_name() -> str:
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
    }
    sections |= {
        "scoring": scoring,
        "weighting": weighting,
        "training": training,
        "evaluation": evaluation,
        "execution": execution,
    }
    given = {
        key: value.model_dump(mode="json", exclude_unset=True) if hasattr(value, "model_dump") else value
        for key, value in sections.items()
        if value is not None
    }
    resolved = load_run(config, given | (overrides or {}))
    return run_self_play(resolved, Store(store))


def models_of(config: RunConfig, store: Store) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
    """The start model, and the models beside it that the user gave."""
    start = resolve(config.policy, config.sampling.template == "chat", store)
    models = {
        role: resolve(model, False, store)
        for role in config.roles
        if (model := getattr(config.models, role)) is not None
    }
    if config.weighting.positive_system is not None or config.weighting.negative_system is not None:
        models |= {"positive": start, "negative": start}  # TIS-DPO (P): one model, two system prompts
    return start, models


def keep_settings(config: RunConfig, store: Store) -> None:
    """`runs/<name>/run.json`: the resolved settings, so that the run can be resumed, asked about and shown by its name."""
    path = store.run_directory(config.name) / RUN_SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, config.model_dump_json(indent=1) + "\n")


def _show_costs(name: str, store: Store) -> None:
    """The ledger by iteration and stage, as a table in Prefect; MLflow has each record's figures already."""
    by = ("step", "stage")
    head, cells = table(total(rows(read(store, name)), by), by)
    try:
        create_table_artifact(
            [dict(zip(head, line, strict=True)) for line in cells], key=f"{name}-costs", description=f"what {name} cost"
        )
    except Exception as error:  # a server that went away costs the picture, not the run
        get_run_logger().warning("the costs could not be sent to Prefect: %s", error)


def run_self_play(config: RunConfig, store: Store) -> dict[str, Any]:
    """Check, play, report. Inside a flow run."""
    logger = get_run_logger()
    checked = preflight(config, store)
    executor_for(
        config.execution, store, logger.info, []
    )  # a pool or a cluster that is not there is refused before anything is written
    start, models = models_of(config, store)
    if config.live_reference:
        logger.info("%s holds the reference model in memory beside the policy while it trains", config.method.name)
    tracker = Tracker(store, config.name, logger.warning)
    tracker.parameters(config.model_dump(mode="json"))
    history = History(config, store, tracker)
    keep_settings(config, store)
    ledger = Ledger(store, config.name)
    # Imports belong to the run where the process was made for it: by the command line, or by a worker.
    is_own = OWN_PROCESS in os.environ or "PREFECT__FLOW_RUN_ID" in os.environ
    ledger.begin(psutil.Process().create_time() if is_own else None)
    place = Place(str(store.root), config.name, "iter_00", ledger.session, config.execution)
    gate = Gate(config.evaluation.gate, history, start)
    try:
        final = play(config, checked, place, start, models, history, gate)
    except BaseException:
        tracker.finish(None, "FAILED")
        raise
    report = history.write_report(plots=True)
    tracker.register({"best": gate.best, "final": final})
    tracker.finish(report)
    ledger.end()
    _show_costs(config.name, store)
    logger.info("report: %s", report)
    return {
        "final": final.path,
        "report": str(report),
        "headline": history.headline(),
        "rows": history.rows,
        "session": ledger.session,
    }
