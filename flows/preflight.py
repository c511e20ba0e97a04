"""Flows - refuse a wrong request before any model loads and before anything is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.adapter import adapter_alone
from data_contracts.artifact import ArtifactRef, FileDigest
from data_contracts.checkpoint import ModelRef, check_model_directory, header_of, weight_files
from data_contracts.errors import ConfigError
from data_contracts.identity import digest_file
from data_contracts.installation import provided
from data_contracts.store import Store, content_digest
from flows.config import RunConfig
from stages.evaluation.judged import BENCHMARKS, check_files
from stages.evaluation.lm_eval import check_suite, load_task
from stages.evaluation.stage import EvaluationConfig, LMEvalSuite, check_sandbox
from stages.evaluation.suites import check_data, clones_of
from stages.models.hub import base_directory, directory_here, model_directory
from stages.models.policy import check_quantisation
from stages.models.tokens import tokenizer_digest, vocabulary_size
from stages.registry import Named
from stages.scoring.base import scorer_class
from stages.scoring.pairing import PAIRINGS
from stages.stage import STAGES
from tasks.data.lengths import fit_to_model
from tasks.data.memory import Memory
from tasks.data.preparation import Prepared, hold_out, prepare
from tasks.data.prompt_set import PromptSet
from tasks.models import LoadedModel, locate, resolve


class Checked(NamedTuple):
    """What the checks have read, so that nothing is read twice."""

    train: PromptSet
    heldout: PromptSet
    evaluation: EvaluationConfig
    """With the digests of its local tasks."""
    data: Prepared | None = None
    """What there is to say of the prompts; None: they come from nowhere."""


def preflight(run: RunConfig, store: Store) -> Checked:
    """Raises: ConfigError for whatever can be known to fail: files, models, prompts, limits, the store.

    Remembered for this process: the command line asks before it starts a server, the flow asks again.
    """
    return _preflight(run.model_dump_json(), store.root)


@cache
def _preflight(settings: str, store_root: Path) -> Checked:
    run = RunConfig.model_validate_json(settings)
    Store(store_root).check_writable()
    run.tracking.check()
    if run.execution.profile == "local":  # elsewhere the stage itself asks
        check_sandbox(run.evaluation)
        for suite in run.evaluation.suites:
            members = check_suite(suite.name, suite.only, suite.allow_code)
            check_data(suite.name, members, suite.data_root, os.environ | run.evaluation.runtime.env)
    memory = Memory(store_root)
    prepared = prepare(run.prompts, run.seed, run.reads)
    prepared.check(run.prompts)
    _check_amount(run, len(prepared.train))
    _check_gpus(run)
    _check_processes(run)
    for setting, scorer, prompts in _scorers(run, prepared):
        try:
            scorer_class(scorer).check_prompts(scorer, prompts)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from None
    answers = run.sampling_for_heldout().num_candidates
    if run.evaluation.best_of and max(run.evaluation.best_of) > answers:
        raise ConfigError(
            f"evaluation.best_of needs {max(run.evaluation.best_of)} held-out answers per prompt, "
            f"heldout_sampling.num_candidates is {answers}"
        )
    evaluation = _with_digests(run.evaluation_of_policies())
    model = locate(run.policy, run.sampling.template == "chat")
    _check_models(run, model)
    check_adapter(run, model)
    if run.execution.profile == "local":  # elsewhere the stage's machine fetches and keeps them
        for scorer in _scorer_settings(run).values():
            for named, _ in scorer_class(scorer).models(scorer):
                model_directory(named)
    prepared = _fitted(run, prepared, model, memory)
    prepared.check(run.prompts)
    _check_amount(run, len(prepared.train))
    return _checked(prepared, evaluation)


def gather(run: RunConfig, store: Store) -> Checked:
    """What a run reads, with no more checks than reading takes.

    Raises: ConfigError for what is missing or malformed.
    """
    memory = Memory(store.root)
    prepared = prepare(run.prompts, run.seed, run.reads)
    prepared = _fitted(run, prepared, locate(run.policy, run.sampling.template == "chat"), memory)
    return _checked(prepared, _with_digests(run.evaluation_of_policies()))


def _checked(prepared: Prepared, evaluation: EvaluationConfig) -> Checked:
    prepared.train.counts = prepared.counts()
    return Checked(prepared.train, prepared.heldout, evaluation, prepared)


def _fitted(run: RunConfig, prepared: Prepared, model: Path, memory: Memory) -> Prepared:
    """The prompts that the policy can read, those that measure apart from those that train."""
    samplings = (run.sampling_for_training(), run.sampling_for_heldout())
    prepared = fit_to_model(prepared, run.prompts, samplings, model, memory, _loaded_models(run, model))
    return hold_out(prepared, run.prompts, run.seed, memory)


def _loaded_models(run: RunConfig, policy: Path) -> list[LoadedModel]:
    """Every model on this disk that a stage of the run will load, once each.

    Raises: ConfigError for a scorer's directory that is no complete model.
    """
    models = [LoadedModel(policy, "causal")]
    named = [getattr(run.models, role) for role in run.roles]
    for ref in (*named, *run.baselines.values()):
        if ref is not None and (directory := directory_here(ref)) is not None:
            if (adapter := adapter_alone(directory)) is not None:
                directory = base_directory(adapter)
            models.append(LoadedModel(directory, "causal"))
    for scorer in _scorer_settings(run).values():
        for ref, task in scorer_class(scorer).models(scorer):
            directory = directory_here(ref)
            if task and directory is not None:
                check_model_directory(directory, chat_template=False)
                models.append(LoadedModel(directory, task))
    return list(dict.fromkeys(models))


SCORER_OF_PAIRS = "scoring.scorer"


def _scorer_settings(run: RunConfig) -> dict[str, Named]:
    """Setting -> scorer: of the pairs, where their pairing asks for scores, of the evaluation, the tournament."""
    scorers: dict[str, Named] = {}
    if PAIRINGS.get(run.pairing).needs_scores and run.scoring.scorer is not None:
        scorers[SCORER_OF_PAIRS] = run.scoring.scorer
    scorers["evaluation.scorer"] = run.evaluation.scorer
    if run.tournament is not None:
        scorers["tournament.scorer"] = run.tournament.scorer
    return scorers


def _scorers(run: RunConfig, prepared: Prepared) -> Iterator[tuple[str, Named, PromptSet]]:
    """Every scorer of the run under its setting, and the prompts whose answers it will score."""
    heldout = prepared.heldout or prepared.train  # of which a part will be held out
    for setting, scorer in _scorer_settings(run).items():
        yield setting, scorer, prepared.train if setting == SCORER_OF_PAIRS else heldout


def _check_amount(run: RunConfig, count: int) -> None:
    iterations = 1 if run.prompts.reuse else run.iterations
    needed = (run.prompts.per_iteration or 1) * iterations
    if needed > count:
        raise ConfigError(
            f"{run.prompts.train} has {count} prompts; {run.iterations} iterations of {run.prompts.per_iteration or 1} "
            f"need {needed}. Lower prompts.per_iteration or iterations, or set prompts.reuse: true"
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
                f"(execution.gpus_per_node): lower execution.gpus.{stage}, "
                "sampling.backend.runtime.tensor_parallel_size or "
                "training.runtime.num_processes, or set execution.gpus_per_node"
            )


def _check_processes(run: RunConfig) -> None:
    """Refuse more training processes than this machine has processors, where they would run on them."""
    processes, cores = run.training.runtime.num_processes, len(os.sched_getaffinity(0))
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    on_cpu = run.training.runtime.device == "cpu" or not has_gpu
    if run.execution.profile == "local" and on_cpu and processes > cores:
        raise ConfigError(
            f"training.runtime.num_processes is {processes}, and this machine has {cores} processors and trains on "
            f"them: set it to at most {cores}"
        )


def _check_models(run: RunConfig, policy: Path) -> None:
    """The other models are there, and their tokens fit what is asked of them."""
    for name, model in run.baselines.items():
        if re.fullmatch(r"\d+|start", name):
            raise ConfigError(f"tournament.baselines: {name!r} would be taken for an iteration; give it another name")
        locate(model, run.sampling.template == "chat")
    named_models = {role: getattr(run.models, role) for role in run.roles}
    if isinstance(run.reference, ModelRef):
        named_models["reference"] = run.reference
    for role, named in named_models.items():
        if named is None:
            continue  # trained by the run itself
        directory = locate(named, chat_template=False)
        if role != "teacher" and tokenizer_digest(directory) != tokenizer_digest(policy):
            setting = role if role == "reference" else f"models.{role}"
            raise ConfigError(
                f"{setting} ({directory}) has another tokenizer than the policy ({policy}): "
                "its log-probs are of other tokens. Train it from the same base model"
            )
        if role == "teacher" and not (directory / "tokenizer.json").is_file():
            raise ConfigError(
                f"models.teacher ({directory}) has no tokenizer.json: "
                "a tokenizer without character offsets cannot be aligned with the policy's"
            )
        if role == "teacher":
            check_vocabularies(run, directory, policy)


def check_adapter(run: RunConfig, policy: Path) -> None:
    """Raises: ConfigError for an adapter that names no layer of the policy, or whose packages are missing here."""
    adapter = run.training.adapter
    if adapter is None:
        return
    is_here = run.execution.profile == "local" and run.training.runtime.python is None
    if is_here and find_spec("peft") is None:
        raise ConfigError("training.adapter needs peft, which is not installed: make venv, or pip install peft==0.21.2")
    if is_here and adapter.name == "qlora":
        check_quantisation()
    if adapter.targets == "auto":
        return
    layers = linear_layers(policy)
    for target in adapter.targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            names = sorted({layer.rpartition(".")[2] for layer in layers})
            raise ConfigError(
                f"training.adapter.targets: the policy ({policy}) has no layer {target!r}; it has {', '.join(names)}"
            )


def linear_layers(directory: Path) -> list[str]:
    """Return the names of a model's matrices but embeddings and head, from the headers of its files."""
    names: list[str] = []
    for path in weight_files(directory):
        header: dict[str, Any] = json.loads(header_of(path))
        names += [
            name.removesuffix(".weight")
            for name, entry in header.items()
            if name.endswith(".weight") and len(entry["shape"]) == 2
        ]
    return [name for name in names if not re.search(r"(embed_tokens|lm_head|wte|wpe|embed_in|embed_out)$", name)]


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
    """Return the evaluation with digests of its local tasks: a changed question changes the key.

    Each task is read once, so that a broken one is refused.
    """
    for task in evaluation.lm_eval:
        load_task(task.path)
    update: dict[str, Any] = {"lm_eval": tuple(_with_digest(task) for task in evaluation.lm_eval)}
    update["suites"] = tuple(_suite_with_digest(suite) for suite in evaluation.suites)
    for name in BENCHMARKS:
        if (settings := getattr(evaluation, name)) is not None:
            check_files(name, settings)
            update[name] = _with_digest(settings)
    return evaluation.model_copy(update=update)


def _with_digest(task: Any) -> Any:
    directory = Path(provided(task.path))
    return task.model_copy(update={"digest": _content(directory, [directory])})


def _suite_with_digest(suite: LMEvalSuite) -> LMEvalSuite:
    """A suite with the digest of the clones that its members read, unless the user gave one."""
    if suite.data_root is None or suite.digest:
        return suite
    root = Path(suite.data_root)
    members = check_suite(suite.name, suite.only, suite.allow_code)
    clones = [next(filter(Path.is_dir, clones_of(root, member.data)), None) for member in members]
    return suite.model_copy(update={"digest": _content(root, [clone for clone in clones if clone is not None])})


def _content(root: Path, directories: Iterable[Path]) -> str:
    """The digest over all files below these directories, by their names below `root`; the history of a clone (.git) is left out."""
    paths = {path for directory in directories for path in directory.rglob("*") if path.is_file()}
    files = [
        FileDigest(name=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=digest_file(path))
        for path in sorted(paths)
        if ".git" not in path.relative_to(root).parts
    ]
    return content_digest(files)


def models_of(config: RunConfig, store: Store) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
    """The start model, and the models beside it that the user gave."""
    start = resolve(config.policy, config.sampling.template == "chat", store)
    models = {
        role: resolve(model, False, store)
        for role in config.roles
        if (model := getattr(config.models, role)) is not None
    }
    if isinstance(config.reference, ModelRef):
        models["reference"] = resolve(config.reference, False, store)
    if config.weighting.positive_system is not None or config.weighting.negative_system is not None:
        models |= {"positive": start, "negative": start}  # TIS-DPO (P): one model, two system prompts
    return start, models
