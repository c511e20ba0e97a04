"""Stage - policy + its held-out generations -> eval_report: score, length, fluency under the start model, and lm-eval tasks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError, ContractError
from data_contracts.shards import read_shards, shard_path, to_table, write_shard
from stages.evaluation.gate import GateConfig
from stages.evaluation.intervals import Interval, bootstrap
from stages.evaluation.judging import report_row
from stages.evaluation.rouge import rouge_l
from stages.evaluation.win_rates import best_of_n
from stages.logps import Pass
from stages.policy import load_causal_lm, pick_device, pin_threads
from stages.registry import Named
from stages.sampling import SAMPLERS
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.stage import SamplingConfig
from stages.scoring import SCORERS
from stages.scoring.base import Candidates, Surroundings, close, prepared
from stages.scoring.checks import repetition
from stages.scoring.endpoint import Endpoint, EndpointRuntime
from stages.stage import Job, StageRuntime
from stages.tokens import context_length, encode_prompt, load_tokenizer, stop_ids

LM_EVAL_SHARD, MT_BENCH_SHARD = 1, 2


class EvaluationRuntime(StageRuntime):
    batch_tokens: int = Field(4096, ge=1)
    """Padded tokens per forward of the start model."""
    lm_eval_batch_size: int = Field(16, ge=1)
    lm_eval_backend: Literal["transformers", "vllm"] = "transformers"
    """What computes log-probs and completions for lm-eval. They agree to some 1e-6 nats in float32."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """More arguments of lm-eval's vLLM engine, e.g. {tensor_parallel_size: 2, gpu_memory_utilization: 0.8}."""


class LMEvalTask(BaseConfig):
    path: str
    """Directory with task.yaml (lm-eval's format) and its data files."""
    limit: int | None = Field(None, ge=1)
    """Only the first questions."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files, so that a changed question is a changed key."""


class LMEvalSuite(BaseConfig):
    """A published set of benchmarks; see stages/evaluation/suites.py."""

    name: Literal["open_llm_v1", "open_llm_v2", "tidpo"]
    data_root: str | None = None
    """Directory with clones of the tasks' datasets. None: the hub, which must then be reachable (HF_HUB_OFFLINE=0 in runtime.env)."""
    only: tuple[str, ...] = ()
    """Some of its tasks."""
    limit: int | None = Field(None, ge=1)
    """Only the first questions of each task: quick, and no published number."""
    allow_code: bool = False
    """Run code that the model wrote (HumanEval). Only in a sandbox."""
    digest: str = ""
    """Of the mirror, for whoever changes it in place: any text, part of the key."""

    @model_validator(mode="after")
    def _known(self) -> LMEvalSuite:
        from stages.evaluation.lm_eval import check_suite

        try:
            check_suite(self.name, self.only, self.allow_code)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class MTBench(BaseConfig):
    """Two-turn questions, answered by the policy and graded by a judge."""

    path: str = "deploy/evals/mt_bench_mini"
    """Directory with question.jsonl, judge_prompts.jsonl and reference_answer*.jsonl: ours, or the official files."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files."""
    judge: str
    """The judge's name at its endpoint; only scores of the same judge compare."""
    backend: SAMPLERS.field() = Field(default_factory=lambda: SAMPLERS.config("vllm"), validate_default=True)
    """What writes the answers."""
    max_new_tokens: int = Field(1024, ge=1)
    """The official length of an answer; what the model's context leaves is for the conversation before it."""
    seed: int = 0
    runtime: EndpointRuntime = EndpointRuntime()


class EvaluationConfig(BaseConfig):
    """How a policy is measured, on prompts that never train."""

    NEUTRAL: ClassVar[dict[str, Any]] = {"suites": (), "mt_bench": None, "best_of": (), "rouge_l": False}

    scorer: SCORERS.field()
    """Scores the held-out generations; without the floors of the training scorer."""
    lm_eval: tuple[LMEvalTask, ...] = ()
    """Local lm-eval tasks."""
    suites: tuple[LMEvalSuite, ...] = ()
    """Published benchmarks by name."""
    mt_bench: MTBench | None = None
    """Judged two-turn questions."""
    best_of: tuple[int, ...] = ()
    """Expected held-out score of the best of n answers, for each of these n; needs heldout_sampling.num_candidates >= n."""
    rouge_l: bool = False
    """ROUGE-L of the held-out answers against the prompts' `response` (distillation)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the passes."""
    gate: GateConfig = GateConfig()
    """Whether a policy that is not better goes on. Decided by the flow; the stage does not read it."""
    runtime: EvaluationRuntime = EvaluationRuntime()


Config = EvaluationConfig


def run(job: Job) -> None:
    config: EvaluationConfig = job.config
    benchmarks = bool(config.lm_eval or config.suites)
    total = 1 + benchmarks + (config.mt_bench is not None)
    pin_threads(None)
    device = pick_device(config.runtime.device)
    if not job.has_shard(0, "eval_report", beside=("heldout",)):
        with job.timed("heldout"):
            heldout = _heldout_rows(job, device)
        write_shard(shard_path(job.out, 0, "heldout"), to_table(heldout, "heldout"))
        job.write(0, _heldout_report(heldout, config.scorer) + _more_heldout_rows(job, heldout))
    job.progress(1, total, "parts")
    if benchmarks and not job.has_shard(LM_EVAL_SHARD, "eval_report"):
        with job.timed("lm_eval"):
            job.write(LM_EVAL_SHARD, _lm_eval_report(job, device))
        job.progress(2, total, "parts")
    if config.mt_bench is not None and not job.has_shard(MT_BENCH_SHARD, "eval_report"):
        with job.timed("mt_bench"):
            job.write(MT_BENCH_SHARD, _mt_bench_report(job, config.mt_bench, device))
        job.progress(total, total, "parts")
    for row in read_shards(job.out, "eval_report").to_pylist():
        job.metrics[f"{row['task']}/{row['metric']}"] = row["value"]


def _heldout_rows(job: Job, device: str) -> list[dict[str, Any]]:
    config: EvaluationConfig = job.config
    prompts = {row["prompt_id"]: row for row in read_shards(job.path("prompts"), "prompts").to_pylist()}
    rows = read_shards(job.path("generations"), "generations").to_pylist()
    if prompts.keys() != {row["prompt_id"] for row in rows}:
        raise ContractError(f"generations {job.inputs['generations'].key} are not of the held-out prompts {job.inputs['prompts'].key}")
    start = Pass(job.store_root, job.inputs["start"], config.dtype, config.runtime.device, config.runtime.batch_tokens)
    prompt_ids, response_ids = [row["prompt_ids"] for row in rows], [row["token_ids"] for row in rows]
    start.fill(prompt_ids, response_ids)
    start.account(job)
    means = [float(row.mean()) for row in start.get(prompt_ids, response_ids)]
    scorer_class = SCORERS.get(config.scorer.name)
    scorer_class.check_prompts(config.scorer, list(prompts.values()))
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(number)
    batch = [Candidates(prompts[name], [rows[i] for i in numbers], [means[i] for i in numbers]) for name, numbers in groups.items()]
    scorer = prepared(
        scorer_class,
        config.scorer,
        device,
        Surroundings(job.store_root, config.runtime.batch_tokens, job.log, used=job.used, waiting=lambda: job.timed("waiting")),
    )
    scores = scorer.score(batch)
    close(scorer)
    heldout = []
    for numbers, result in zip(groups.values(), scores, strict=True):
        for k, i in enumerate(numbers):
            value = None if result.scores is None or np.isnan(result.scores[k]) else float(result.scores[k])
            heldout.append(
                {
                    "prompt_id": rows[i]["prompt_id"],
                    "candidate": rows[i]["candidate"],
                    "completion": rows[i]["completion"],
                    "score": value,
                    "num_tokens": len(rows[i]["token_ids"]),
                    "finished": rows[i]["finish_reason"] == "stop",
                    "start_logp": means[i],
                }
            )
    return heldout


def per_prompt(heldout: list[dict[str, Any]], column: str) -> dict[str, float]:
    """Mean of a column over the candidates of each prompt; unscored ones left out."""
    values: dict[str, list[float]] = {}
    for row in heldout:
        if row[column] is not None:
            values.setdefault(row["prompt_id"], []).append(float(row[column]))
    return {name: float(np.mean(group)) for name, group in values.items()}


def _heldout_report(heldout: list[dict[str, Any]], scorer: Named) -> list[dict[str, Any]]:
    columns = {
        "score": "score",
        "num_tokens": "mean_tokens",
        "finished": "finished_rate",
        "start_logp": "start_logp",
        "repetition": "repetition",
    }
    heldout = [row | {"repetition": repetition(row["completion"])} for row in heldout]
    rows = []
    for column, metric in columns.items():
        values = per_prompt(heldout, column)
        if not values:
            continue
        interval = bootstrap([values[name] for name in sorted(values)])
        rows.append(
            {
                "suite": "heldout",
                "task": "heldout",
                "metric": metric,
                "value": interval.mean,
                "stderr": interval.stderr,
                "low": interval.low,
                "high": interval.high,
                "n": len(values),
                "n_shot": 0,
                "task_version": scorer.name,
            }
        )
    # A policy that answers everything with one good sentence scores well; this shows it.
    distinct = len({row["completion"] for row in heldout}) / len(heldout)
    rows.append(
        {
            "suite": "heldout",
            "task": "heldout",
            "metric": "distinct_rate",
            "value": distinct,
            "stderr": None,
            "low": None,
            "high": None,
            "n": len(heldout),
            "n_shot": 0,
            "task_version": "1",
        }
    )
    return rows


def _more_heldout_rows(job: Job, heldout: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the options `best_of` and `rouge_l` ask for; nothing without them."""
    config: EvaluationConfig = job.config
    found: dict[str, Interval] = {}
    counts: dict[str, int] = {}
    groups: dict[str, list[Any]] = {}
    for row in heldout:
        groups.setdefault(row["prompt_id"], []).append(row["score"])
    if config.best_of:
        if max(config.best_of) > min(map(len, groups.values())):
            raise ConfigError(
                f"evaluation.best_of = {list(config.best_of)} needs {max(config.best_of)} held-out answers per prompt, there are "
                f"{min(map(len, groups.values()))}: set heldout_sampling.num_candidates"
            )
        for n, interval in best_of_n(groups, config.best_of).items():
            found[f"best_of_{n}"] = interval
            counts[f"best_of_{n}"] = sum(sum(score is not None for score in scores) >= n for scores in groups.values())
    if config.rouge_l:
        references = {row["prompt_id"]: row["response"] for row in read_shards(job.path("prompts"), "prompts").to_pylist()}
        rows = [
            row | {"rouge_l": rouge_l(row["completion"], references[row["prompt_id"]])} for row in heldout if references[row["prompt_id"]]
        ]
        if not rows:
            raise ConfigError("evaluation.rouge_l compares with the held-out prompts' `response`, and none of them has one")
        values = per_prompt(rows, "rouge_l")
        found["rouge_l"], counts["rouge_l"] = bootstrap([values[name] for name in sorted(values)]), len(values)
    return [
        report_row("heldout", "heldout", metric, one.mean, counts[metric], one.stderr, one.low, one.high, config.scorer.name)
        for metric, one in found.items()
    ]


def _lm_eval_report(job: Job, device: str) -> list[dict[str, Any]]:
    from stages.evaluation.lm_eval import evaluate_suite, evaluate_tasks, load_task, open_transformers, open_vllm

    config: EvaluationConfig = job.config
    directory = job.path("policy")
    if config.runtime.lm_eval_backend == "vllm":
        lm = open_vllm(str(directory), config.dtype, device, config.runtime.vllm)
    else:
        policy = load_causal_lm(str(directory), config.dtype, device).eval()
        lm = open_transformers(policy, load_tokenizer(directory), config.runtime.lm_eval_batch_size)
    rows = []
    for task in config.lm_eval:
        rows += evaluate_tasks(lm, [load_task(task.path)], task.limit)
    for suite in config.suites:
        rows += evaluate_suite(lm, suite.name, suite.data_root, suite.limit, suite.only, suite.allow_code)
    return rows


def _mt_bench_report(job: Job, config: MTBench, device: str) -> list[dict[str, Any]]:
    from stages.evaluation import mt_bench
    from stages.evaluation.judging import EndpointJudge

    bench = mt_bench.load(config.path)
    answers = mt_bench.answer(bench, _chat(str(job.path("policy")), config, device))
    judge = EndpointJudge(config.judge, Endpoint(config.runtime, job.store_root))
    rows = mt_bench.report(mt_bench.judge_singly(bench, answers, judge), config.judge)
    if failed := int(rows[-1]["value"]):
        job.log(f"{failed} of {rows[-1]['n']} judgments of {config.judge} failed; they are in no mean")
    return rows


def _chat(model: str, config: MTBench, device: str) -> Any:
    """mt_bench.Generate with a sampler of the sample stage."""
    tokenizer, context = load_tokenizer(model), context_length(model) or 4096
    if config.max_new_tokens >= context:
        raise ConfigError(
            f"mt_bench.max_new_tokens = {config.max_new_tokens} leaves nothing of the model's context of {context} for the questions"
        )
    sampling = SamplingConfig(
        backend=config.backend, max_new_tokens=config.max_new_tokens, max_prompt_tokens=context - config.max_new_tokens, num_candidates=1
    )
    stops = stop_ids(model, tokenizer)
    sampler = SAMPLERS.get(config.backend.name)(config.backend, sampling, model, stops, device)

    def generate(conversations: Any, temperatures: Any, limit: int) -> list[str]:
        prompts = []
        for number, conversation in enumerate(conversations):
            ids = encode_prompt(tokenizer, conversation, "chat")
            if len(ids) > sampling.max_prompt_tokens:
                raise ConfigError(
                    f"conversation {number} of {config.path} has {len(ids)} tokens, and mt_bench.max_new_tokens = {config.max_new_tokens} leaves "
                    f"{sampling.max_prompt_tokens} of the model's context: lower it"
                )
            name = f"{number}/{len(conversation)}"
            prompts.append(Prompt(name, ids, candidate_seeds(config.seed, name, 1)))
        texts = [""] * len(prompts)
        for temperature in sorted(set(temperatures)):
            chosen = [i for i, one in enumerate(temperatures) if one == temperature]
            sampler.sampling = sampling.model_copy(update={"temperature": temperature})
            for i, (candidate,) in zip(chosen, sampler.generate([prompts[i] for i in chosen]), strict=True):
                ids = candidate.token_ids
                texts[i] = tokenizer.decode(ids[:-1] if ids[-1] in stops else ids, skip_special_tokens=True)
        return texts

    return generate
