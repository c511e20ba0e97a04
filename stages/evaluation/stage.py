"""Stage - policy + its held-out generations -> eval_report: held-out numbers, lm-eval tasks and judged benchmarks.

Each part is a shard of its own, so a stage that was interrupted begins with the first part that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field, model_validator

from data_contracts.artifact import ArtifactRef
from data_contracts.errors import ConfigError, TransientError
from data_contracts.rows import ReportRow
from data_contracts.shards import read_shards
from stages.evaluation import sandbox
from stages.evaluation.given import VERSION as GIVEN_VERSION
from stages.evaluation.given import has_given_texts
from stages.evaluation.heldout import evaluate_heldout
from stages.evaluation.judged import BENCHMARKS, AlpacaEval, ArenaHard, MTBench
from stages.evaluation.lm_eval import (
    CUT,
    Prompting,
    check_packages,
    check_suite,
    evaluate_suite,
    evaluate_task,
    open_transformers,
    open_vllm,
)
from stages.evaluation.rows import column_names
from stages.job import Job
from stages.models.families import attention_addition
from stages.models.lazy import import_auto_classes
from stages.models.memory import free_device_memory
from stages.models.policy import load_causal_lm, pick_device, pin_threads
from stages.models.tokens import load_tokenizer
from stages.models.turn_settings import TurnConfig
from stages.registry import Named
from stages.scoring import SCORERS
from stages.scoring.base import compares
from stages.stage import StageRuntime

HELDOUT_SHARD, LM_EVAL_SHARD = 0, 1
"""Shards of eval_report; those of the judged benchmarks follow."""


class EvaluationRuntime(StageRuntime):
    """How the evaluate stage is executed."""

    batch_tokens: int = Field(default=4096, ge=1)
    """Padded tokens per forward of the start model."""
    lm_eval_batch_size: int = Field(default=16, ge=1)
    lm_eval_backend: Literal["transformers", "vllm"] = "transformers"
    """What computes log-probs and completions for lm-eval. They agree to some 1e-6 nats in float32."""
    sandbox: bool = True
    """Code that the model wrote (`allow_code`) runs in namespaces of its own (stages/evaluation/sandbox.py), or not at
    all. False: limits, an empty environment and a process of its own are enough, because the machine holds nothing else
    and can be thrown away."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """More arguments of lm-eval's vLLM engine, e.g. {tensor_parallel_size: 2, gpu_memory_utilization: 0.8}."""


class LMEvalTask(Prompting):
    """A local lm-eval task."""

    path: str
    """Directory with task.yaml (lm-eval's format) and its data files."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files, so that a changed question is a changed key."""


class LMEvalSuite(Prompting):
    """A published set of benchmarks; see stages/evaluation/suites.py."""

    name: Literal["open_llm_v1", "open_llm_v2", "tidpo"]
    data_root: str | None = None
    """Directory with clones of the tasks' datasets. None: the hub, which must then be reachable (HF_HUB_OFFLINE=0 in
    runtime.env)."""
    only: tuple[str, ...] = ()
    """Some of its tasks."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions of each task: quick, and no published number."""
    allow_code: bool = False
    """Run code that the model wrote (HumanEval), in a sandbox: see runtime.sandbox."""
    digest: str = ""
    """Filled in by the flow: hash of the data sets in `data_root` that its tasks read. Any text of yours is kept."""

    @model_validator(mode="after")
    def _known(self) -> LMEvalSuite:
        try:
            check_suite(self.name, self.only, self.allow_code)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class EvaluationConfig(TurnConfig):
    """How a policy is measured, on prompts that never train.

    How conversations become tokens (`template` to `special_tokens_in_data`) is the sampler's, and set for you from the
    run's `sampling`: given texts of held-out prompts are tokenised by it (stages/evaluation/given.py).
    """

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "suites": (),
        "best_of": (),
        "rouge_l": False,
    } | dict.fromkeys(BENCHMARKS)

    scorer: Annotated[Named, SCORERS]
    """Scores the held-out generations; without the floors of the training scorer."""
    lm_eval: tuple[LMEvalTask, ...] = ()
    """Local lm-eval tasks."""
    suites: tuple[LMEvalSuite, ...] = ()
    """Published benchmarks by name."""
    mt_bench: MTBench | None = None
    """Two-turn questions that a judge grades."""
    alpaca_eval: AlpacaEval | None = None
    """A judge compares with a baseline's answers, with and without length control."""
    arena_hard: ArenaHard | None = None
    """A judge compares with a baseline's answers in two games, with style control."""
    best_of: tuple[int, ...] = ()
    """Expected held-out score of the best of n answers, for each n; needs heldout_sampling.num_candidates >= n."""
    rouge_l: bool = False
    """ROUGE-L of the held-out answers against the prompts' `response` (distillation)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes."""
    runtime: EvaluationRuntime = EvaluationRuntime()

    @model_validator(mode="after")
    def _scores_one_answer(self) -> EvaluationConfig:
        if compares(self.scorer):
            raise ValueError(
                f"evaluation.scorer {self.scorer.name} as set only compares two answers and gives none of them a "
                "score: take one that does, and compare policies with it in `tournament`"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The settings without those of the turns, which count where there are given texts: see `key_additions`."""
        return {name: value for name, value in super().identity().items() if name not in TurnConfig.model_fields}

    def heldout_only(self) -> EvaluationConfig:
        """The same settings without benchmarks: what the checkpoints of one training are compared by."""
        return self.model_copy(
            update={"lm_eval": (), "suites": (), "best_of": (), "rouge_l": False} | dict.fromkeys(BENCHMARKS)
        )


Config = EvaluationConfig


def key_additions(config: EvaluationConfig, inputs: Mapping[str, ArtifactRef]) -> dict[str, Any]:
    """Before given texts of held-out prompts were measured, an evaluation was the same with them and without; and see
    `attention_addition`."""
    additions = attention_addition(inputs.values())
    if "prompts" in inputs and has_given_texts(inputs["prompts"].path):
        turns = TurnConfig(**{name: getattr(config, name) for name in TurnConfig.model_fields})
        additions["given_texts"] = {"version": GIVEN_VERSION, **turns.identity()}
    return additions


def preload(config: EvaluationConfig) -> None:
    """Import what `run` will; once for many stages, before any is forked (stages/forkserver.py)."""
    import_auto_classes()


class Part(NamedTuple):
    """A shard of eval_report."""

    name: str
    shard: int
    evaluate: Callable[[], list[ReportRow]]
    beside: tuple[str, ...] = ()
    """Tables that the shard writes beside its report."""


def run(job: Job) -> None:
    """Write the parts of eval_report that are missing, and the report's numbers as metrics of the record.

    Raises: TransientError, after all other parts are written, if a judge did not answer.
    """
    config: EvaluationConfig = job.config
    pin_threads(None)
    device = pick_device(config.runtime.device)
    parts = [Part("heldout", HELDOUT_SHARD, partial(evaluate_heldout, job, device), ("heldout",))]
    if config.lm_eval or config.suites:
        parts.append(Part("lm_eval", LM_EVAL_SHARD, partial(_lm_eval_report, job, device)))
    for name, benchmark in BENCHMARKS.items():
        if (settings := getattr(config, name)) is not None:
            parts.append(Part(name, benchmark.shard, partial(benchmark.evaluate, job, settings, device)))
    unanswered: TransientError | None = None
    for number, part in enumerate(parts, start=1):
        if not job.has_shard(part.shard, "eval_report", beside=part.beside):
            try:
                with job.timed(part.name):
                    job.write(part.shard, part.evaluate())
            except TransientError as error:  # a judge is away: the parts that need none are made all the same
                job.log(f"{part.name}: {error}")
                unanswered = unanswered or error
        job.progress(number, len(parts), "parts")
    if unanswered is not None:
        raise unanswered
    rows = cast(list[ReportRow], read_shards(job.out, "eval_report").to_pylist())
    for name, row in zip(column_names(rows), rows, strict=True):
        job.metrics[name] = row["value"]
        if row["metric"] == "failed_judgments" and row["value"]:
            job.log(
                f"{row['task']}: {row['value']:.0f} of {row['n']} judgments of {row['task_version']} could not be "
                f"read; they are in no mean"
            )


def check_sandbox(config: EvaluationConfig) -> None:
    """Try the sandbox if code that the model wrote will be run in it. Raises: ConfigError."""
    members = [member for suite in config.suites for member in check_suite(suite.name, suite.only, suite.allow_code)]
    if any(member.unsafe for member in members):
        sandbox.check(config.runtime.sandbox)


def _lm_eval_report(job: Job, device: str) -> list[ReportRow]:
    """Rows of eval_report for the local lm-eval tasks and the suites, with the policy loaded once."""
    config: EvaluationConfig = job.config
    for suite in config.suites:
        check_packages(suite.name, check_suite(suite.name, suite.only, suite.allow_code))
    check_sandbox(config)
    directory = job.path("policy")
    if config.runtime.lm_eval_backend == "vllm":
        lm = open_vllm(str(directory), config.dtype, device, config.runtime.vllm)
    else:
        policy = load_causal_lm(str(directory), config.dtype, device).eval()
        lm = open_transformers(policy, load_tokenizer(directory), config.runtime.lm_eval_batch_size)
    rows: list[ReportRow] = []
    for task in config.lm_eval:
        rows += evaluate_task(lm, task.path, task.limit, task)
    for suite in config.suites:
        rows += evaluate_suite(
            lm, suite.name, suite.data_root, suite.limit, suite.only, suite.allow_code, config.runtime.sandbox, suite
        )
    for row in rows:
        if row["metric"] == CUT:
            job.log(
                f"warning: {row['task']}: the prompts of {row['value']:.0f} of {row['n']} questions are longer than the "
                f"model's context and were cut on the left: its numbers are not the published ones"
            )
    del lm
    free_device_memory()  # a judge's engine may come next
    return rows
