"""Flows - refuse a wrong request before any model loads and before anything is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

from data_contracts.artifact import ArtifactRef, FileDigest
from data_contracts.errors import ConfigError, StageError
from data_contracts.identity import digest_file, digest_text
from data_contracts.near_duplicates import check_disjoint
from data_contracts.prompts import load_prompts
from data_contracts.store import Store, content_digest
from flows.config import RunConfig
from stages.evaluation.judged import BENCHMARKS, check_files
from stages.evaluation.lm_eval import load_task
from stages.evaluation.stage import EvaluationConfig, check_sandbox
from stages.models.tokens import tokenizer_digest, vocabulary_size
from stages.scoring.base import scorer_class
from stages.scoring.pairing import PAIRINGS
from stages.stage import STAGES
from tasks.launch import CHECKOUT
from tasks.models import locate, resolve


class Checked(NamedTuple):
    """What the checks have read, so that nothing is read twice."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    evaluation: EvaluationConfig
    """With the digests of its local tasks."""


def preflight(run: RunConfig, store: Store) -> Checked:
    """Raises: ConfigError for whatever can be known to fail: files, models, prompts, limits, the store.

    Remembered for this process: the command line asks before it starts a server, the flow asks again.
    """
    checked, passed = _preflight(run.model_dump_json(), store.root)
    if passed and store.root.is_dir():  # a check alone makes no store
        passed.parent.mkdir(exist_ok=True)
        passed.touch()
    return checked


@cache
def _preflight(settings: str, store_root: Path) -> tuple[Checked, Path]:
    """What was read, and the file that remembers that the prompts passed."""
    run = RunConfig.model_validate_json(settings)
    Store(store_root).check_writable()
    if run.execution.profile == "local":  # elsewhere the stage itself asks
        check_sandbox(run.evaluation)
    checked = gather(run)
    train, heldout, _ = checked
    check_disjoint(train, heldout, run.prompts.duplicate_similarity)
    _check_amount(run, train)
    _check_gpus(run)
    _check_processes(run)
    tournament = run.tournament
    needs = PAIRINGS.get(run.pairing)
    scorers = []
    if needs.needs_scores and run.scoring.scorer is not None:
        scorers.append((run.scoring.scorer, train))
    scorers.append((run.evaluation.scorer, heldout))
    if tournament is not None:
        scorers.append((tournament.scorer, heldout))
    for scorer, rows in scorers:
        scorer_class(scorer).check_prompts(scorer, rows)
    for field in () if run.prompts.answers_from_teacher else needs.texts:
        if missing := [row["prompt_id"] for row in train if row[field] is None]:
            raise ConfigError(
                f"pairing {run.pairing} trains on given texts; {len(missing)} prompts of {run.prompts.train} have no "
                f"`{field}`, e.g. {missing[:3]}"
            )
    answers = run.sampling_for_heldout().num_candidates
    if run.evaluation.best_of and max(run.evaluation.best_of) > answers:
        raise ConfigError(
            f"evaluation.best_of needs {max(run.evaluation.best_of)} held-out answers per prompt, "
            f"heldout_sampling.num_candidates is {answers}"
        )
    model = locate(run.policy, run.sampling.template == "chat")
    _check_models(run, model)
    return checked, _check_tokens(run, model, train, heldout, store_root / "checked_prompts")


def gather(run: RunConfig) -> Checked:
    """What a run reads, with no more checks than reading takes.

    Raises: ConfigError for a file that is missing or malformed.
    """
    train, heldout = (
        cast("list[dict[str, Any]]", load_prompts(path)) for path in (run.prompts.train, run.prompts.heldout)
    )
    return Checked(train, heldout, _with_digests(run.evaluation))


def _check_amount(run: RunConfig, train: list[dict[str, Any]]) -> None:
    iterations = 1 if run.prompts.reuse else run.iterations
    needed = (run.prompts.per_iteration or 1) * iterations
    if needed > len(train):
        raise ConfigError(
            f"{run.prompts.train} has {len(train)} prompts; {run.iterations} iterations of {run.prompts.per_iteration or 1} need {needed}. "
            "Lower prompts.per_iteration or iterations, or set prompts.reuse: true"
        )


def _check_gpus(run: RunConfig) -> None:
    """Refuse GPU requests that no node can satisfy: the engine would wait until execution.start_timeout_seconds."""
    available = run.execution.gpus_per_node
    if available is None:
        return
    for stage in (*STAGES, *run.refine):
        needed = run.execution.gpus_of(stage, run.settings_of(stage))
        if needed > available:
            raise ConfigError(
                f"{stage}: one worker asks for {needed} GPUs on a node, and no node has more than {available} "
                f"(execution.gpus_per_node): lower execution.gpus.{stage}, sampling.backend.runtime.tensor_parallel_size or "
                "training.runtime.num_processes, or set execution.gpus_per_node"
            )


def _check_processes(run: RunConfig) -> None:
    """Refuse more training processes than this machine has processors, where they would run on them."""
    processes, cores = run.training.runtime.num_processes, len(os.sched_getaffinity(0))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    on_cpu = run.training.runtime.device == "cpu" or not has_gpu
    if run.execution.profile == "local" and on_cpu and processes > cores:
        raise ConfigError(
            f"training.runtime.num_processes is {processes}, and this machine has {cores} processors and trains on them: "
            f"set it to at most {cores}"
        )


def _check_models(run: RunConfig, policy: Path) -> None:
    """The other models are there, and their tokens fit what is asked of them."""
    for name, model in run.baselines.items():
        if re.fullmatch(r"\d+|start", name):
            raise ConfigError(f"tournament.baselines: {name!r} would be taken for an iteration; give it another name")
        locate(model, run.sampling.template == "chat")
    for role in run.roles:
        named = getattr(run.models, role)
        if named is None:
            continue  # trained by the run itself
        directory = locate(named, chat_template=False)
        if role != "teacher" and tokenizer_digest(directory) != tokenizer_digest(policy):
            raise ConfigError(
                f"models.{role} ({directory}) has another tokenizer than the policy ({policy}): its log-probs are of other tokens. Train it from the same base model"
            )
        if role == "teacher" and not (directory / "tokenizer.json").is_file():
            raise ConfigError(
                f"models.teacher ({directory}) has no tokenizer.json: a tokenizer without character offsets cannot be aligned with the policy's"
            )
        if role == "teacher":
            check_vocabularies(run, directory, policy)


def check_vocabularies(run: RunConfig, teacher: Path, policy: Path) -> None:
    """A teacher's logits compare with the policy's one by one. Raises: ConfigError where they cannot."""
    if getattr(run.method, "common_vocabulary", True):
        return
    sizes = vocabulary_size(teacher), vocabulary_size(policy)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ConfigError(
            f"models.teacher ({teacher}) gives logits of {sizes[0]} ids, the policy ({policy}) of {sizes[1]}: "
            f"{run.method.name} compares them id by id. If the two pad one tokenizer's vocabulary differently, set "
            "method.common_vocabulary: true (both are cut to the smaller one); else use the method uld"
        )


def _with_digests(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Local tasks and questions are read once, to refuse a broken one, and hashed: a changed question is a changed
    key.
    """
    for task in evaluation.lm_eval:
        load_task(task.path)
    update: dict[str, Any] = {"lm_eval": tuple(_with_digest(task) for task in evaluation.lm_eval)}
    for name in BENCHMARKS:
        if (settings := getattr(evaluation, name)) is not None:
            check_files(name, settings)
            update[name] = _with_digest(settings)
    return evaluation.model_copy(update=update)


def _with_digest(task: Any) -> Any:
    directory = Path(task.path)
    files = [
        FileDigest(name=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest_file(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
    return task.model_copy(update={"digest": content_digest(files)})


def _check_tokens(
    run: RunConfig, model: Path, train: list[dict[str, Any]], heldout: list[dict[str, Any]], memory: Path
) -> Path:
    """Every prompt fits, by the model's own tokenizer: asked in the sampler's interpreter, for this one may have no
    transformers.

    Asking takes seconds, and a finished run is asked again: a file in `memory`, named after the content of everything
    the answer depends on, says that this very request has passed. Returns: that file.
    """
    python = run.sampling.runtime.python or sys.executable
    request = {
        "model": str(model),
        "sets": [
            [run.sampling_for_training().model_dump(mode="json"), train],
            [run.sampling_for_heldout().model_dump(mode="json"), heldout],
        ],
    }
    files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    digest = digest_text(json.dumps([python, request["sets"], [[path.name, digest_file(path)] for path in files]]))
    if (memory / digest).is_file():
        return memory / digest
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(request, file)
        file.flush()
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        try:
            result = subprocess.run(
                [python, "-m", "stages.sampling.check", file.name],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
        except OSError as error:
            raise ConfigError(f"sampling.runtime.python = {python!r} cannot be run: {error.strerror}") from None
    if result.returncode == ConfigError.exit_code:
        raise ConfigError(result.stdout.strip())
    if result.returncode:
        raise StageError(
            f"the check of the prompts in {python} ended with code {result.returncode}:\n{result.stderr[-2000:]}"
        )
    return memory / digest


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
