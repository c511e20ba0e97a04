"""Stages - the judged benchmarks of the evaluate stage: their settings, the policy's answers and the judge's verdicts.

The policy answers with a sampler of the sample stage; the judge is any OpenAI-compatible endpoint. A judgment that
cannot be read is counted in `failed_judgments` and enters no mean. A judge that does not answer ends the stage: the
policy's answers, which lie beside the report, and the judgments so far are used by the next try.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from data_contracts.config import Config as BaseConfig
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.installation import provided
from data_contracts.rows import ReportRow
from stages.evaluation import alpaca_eval, arena_hard, mt_bench
from stages.evaluation.judging import EndpointJudge, read_rows
from stages.job import Job
from stages.models.memory import free_device_memory
from stages.models.tokens import context_length
from stages.models.turn_settings import TurnConfig
from stages.models.turns import Turns, with_room_for_system
from stages.registry import Named
from stages.sampling import SAMPLERS
from stages.sampling.base import Prompt, candidate_seeds
from stages.sampling.stage import SamplingConfig
from stages.scoring.endpoint import Endpoint, EndpointRuntime


class Judged(BaseConfig):
    """A benchmark whose answers a judge reads."""

    NEUTRAL: ClassVar[dict[str, Any]] = {"limit": None}
    READING: ClassVar[str] = "2"
    """Raise it when the same replies give other numbers; see stages/scoring/verdicts.py."""

    path: str
    """Directory with the questions and the judge's prompt, as docs/evaluation.md lists them."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions: quick, and no published number."""
    digest: str = ""
    """Filled in by the flow: hash of the directory's files."""
    judge: str
    """The judge's name at its endpoint; only scores of the same judge compare."""
    backend: Annotated[Named, SAMPLERS] = Field(default_factory=lambda: SAMPLERS.config("vllm"), validate_default=True)
    """The sampler that writes the answers."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Of an answer; the rest of the model's context is for the question and the conversation before it."""
    seed: int = 0
    runtime: EndpointRuntime = EndpointRuntime()

    @property
    def directory(self) -> str:
        """`path`, or where the installation has it."""
        return provided(self.path)

    def identity(self) -> dict[str, Any]:
        """The settings, and which rules read the judge's replies: others give other numbers."""
        return super().identity() | {"VERSION": self.READING}


class MTBench(Judged):
    """Two-turn questions, answered by the policy and graded by a judge from 1 to 10."""

    NEUTRAL: ClassVar[dict[str, Any]] = Judged.NEUTRAL | {"baseline": None}

    path: str = "deploy/evals/mt_bench_mini"
    """Directory with question.jsonl, judge_prompts.jsonl and reference_answer*.jsonl: ours, or the official files."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """The official length of an answer."""
    baseline: str | None = None
    """Also judge in pairs, both orders, against `start` (the start model's answers) or a file in `path` with another
    model's answers, as FastChat writes it."""


class AlpacaEval(Judged):
    """AlpacaEval 2: a judge prefers the policy's or the baseline's answer, by the log-probs of one token."""

    temperature: float = Field(default=0.7, ge=0)
    """Of the policy's answers. Each entry of the leaderboard has its own."""


class ArenaHard(Judged):
    """Two games per prompt against a baseline's answers."""

    max_new_tokens: int = Field(default=4096, ge=1)
    """The official length of an answer."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the policy's answers."""


def evaluate_mt_bench(job: Job, config: MTBench, device: str) -> list[ReportRow]:
    """Rows of eval_report: the grades, and the win rate against a baseline if one is set."""
    bench = mt_bench.load(config.directory, config.limit)

    def answer() -> list[dict[str, Any]]:
        turns_of = mt_bench.answer(bench, chat(str(job.path("policy")), config, device))
        return [{"question_id": name, "choices": [{"index": 0, "turns": turns}]} for name, turns in turns_of.items()]

    lines = _answered_once(job, "mt_bench", len(bench.questions), answer)
    answers = {line["question_id"]: line["choices"][0]["turns"] for line in lines}
    judge = EndpointJudge(config.judge, Endpoint(config.runtime, job.store_root))
    rows = mt_bench.report(mt_bench.judge_singly(bench, answers, judge), config.judge)
    if config.baseline is None:
        return rows
    if config.baseline == "start":
        baseline = mt_bench.answer(bench, chat(str(job.path("start")), config, device))
    else:
        baseline = mt_bench.load_answers(Path(config.directory) / config.baseline, bench)
    return rows + mt_bench.report(mt_bench.judge_in_pairs(bench, answers, baseline, judge), config.judge, "outcome")


def evaluate_alpaca_eval(job: Job, config: AlpacaEval, device: str) -> list[ReportRow]:
    """Rows of eval_report: win rates against the baseline's answers."""
    bench = alpaca_eval.load(config.directory, config.limit)

    def answer() -> list[dict[str, Any]]:
        texts = _answers(job, config, [row["instruction"] for row in bench.rows], config.temperature, device)
        return [
            {"instruction": row["instruction"], "output": text, "baseline": row["output"]}
            for row, text in zip(bench.rows, texts, strict=True)
        ]

    rows = _answered_once(job, "alpaca_eval", len(bench.rows), answer)
    judge = EndpointJudge(config.judge, Endpoint(config.runtime, job.store_root))
    preferences = alpaca_eval.annotate(judge, bench.template, rows, config.seed)
    lengths, baseline_lengths = [len(row["output"]) for row in rows], [len(row["output"]) for row in bench.rows]
    rates = alpaca_eval.win_rates(preferences, lengths, baseline_lengths, bench.difficulty, bench.gamed)
    return alpaca_eval.report(rates, config.judge)


def evaluate_arena_hard(job: Job, config: ArenaHard, device: str) -> list[ReportRow]:
    """Rows of eval_report: scores against the baseline's answers."""
    bench = arena_hard.load(config.directory, config.limit)

    def answer() -> list[dict[str, Any]]:
        texts = _answers(job, config, [row["prompt"] for row in bench.rows], config.temperature, device)
        return [row | {"answer": text} for row, text in zip(bench.rows, texts, strict=True)]

    rows = _answered_once(job, "arena_hard", len(bench.rows), answer)
    judge = EndpointJudge(config.judge, Endpoint(config.runtime, job.store_root))
    games = arena_hard.play(judge, bench.system, bench.template, arena_hard.POLICY, rows)
    return arena_hard.report(games, config.judge)


class Benchmark(NamedTuple):
    """How a judged benchmark is run."""

    shard: int
    """Its shard of eval_report."""
    load: Callable[[str, int | None], Any]
    """(directory, limit) -> the files' contents. Raises: ConfigError."""
    evaluate: Callable[[Job, Any, str], list[ReportRow]]
    """(job, settings, device) -> rows of eval_report."""


BENCHMARKS = {
    "mt_bench": Benchmark(2, mt_bench.load, evaluate_mt_bench),
    "alpaca_eval": Benchmark(3, alpaca_eval.load, evaluate_alpaca_eval),
    "arena_hard": Benchmark(4, arena_hard.load, evaluate_arena_hard),
}
"""Name of the section in the settings -> benchmark."""


def check_files(name: str, config: Any) -> None:
    """Read the files of a benchmark. Raises: ConfigError for what is missing or broken."""
    bench = BENCHMARKS[name].load(config.directory, config.limit)
    if name == "mt_bench" and config.baseline not in (None, "start"):
        mt_bench.load_answers(Path(config.directory) / config.baseline, bench)


def _answers(job: Job, config: Judged, prompts: Sequence[str], temperature: float, device: str) -> Sequence[str]:
    """The policy's answer to each prompt."""
    generate = chat(str(job.path("policy")), config, device)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return generate(conversations, [temperature] * len(prompts), config.max_new_tokens)


def _answered_once(job: Job, name: str, count: int, answer: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The policy's answers, kept beside the report: those of an earlier try of this artifact, `count` of them, or those
    that `answer` gives. An answer that is sampled again may differ, and every judgment of it would be paid again.
    """
    path = job.out / f"{name}_answers.jsonl"
    if path.exists():
        with suppress(ConfigError):  # damaged: answered again
            if len(rows := read_rows(path)) == count:
                return rows
    rows = answer()
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def chat(model: str, config: Judged, device: str) -> mt_bench.Generate:
    """The function that answers conversations with a sampler of the sample stage.

    Raises: ConfigError, at once or when called, if the model's context is too short.
    """
    turns, context = with_room_for_system(Turns(model, TurnConfig())), context_length(model) or 4096
    if config.max_new_tokens >= context:
        raise ConfigError(
            f"{config.path}: max_new_tokens = {config.max_new_tokens} leaves nothing of the model's context of "
            f"{context} for the questions"
        )
    sampling = SamplingConfig(
        backend=config.backend,
        max_new_tokens=config.max_new_tokens,
        max_prompt_tokens=context - config.max_new_tokens,
        num_candidates=1,
    )
    free_device_memory()  # of the previous benchmark's engine
    sampler_class = SAMPLERS.get(config.backend.name)
    sampler = sampler_class(config.backend, sampling, model, turns.stop_ids, device, turns.blank_ids)

    def generate(conversations: Any, temperatures: Any, limit: int) -> list[str]:
        prompts = []
        for number, conversation in enumerate(conversations):
            ids = turns.prompt(conversation)
            if len(ids) > sampling.max_prompt_tokens:
                raise ConfigError(
                    f"conversation {number} of {config.path} has {len(ids)} tokens, and max_new_tokens = "
                    f"{config.max_new_tokens} leaves {sampling.max_prompt_tokens} of the model's context: lower it"
                )
            name = f"{number}/{len(conversation)}"
            prompts.append(Prompt(name, ids, candidate_seeds(config.seed, name, 1)))
        texts = [""] * len(prompts)
        for temperature in sorted(set(temperatures)):
            chosen = [i for i, other in enumerate(temperatures) if other == temperature]
            sampler.sampling = sampling.model_copy(update={"temperature": temperature})
            for i, (candidate,) in zip(chosen, sampler.generate([prompts[i] for i in chosen]), strict=True):
                ids = candidate.token_ids
                if turns.ended(ids):
                    ids = ids[:-1]
                texts[i] = turns.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return texts

    return generate
