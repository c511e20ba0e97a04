"""Stages - MT-Bench: two-turn questions, judged singly (1 to 10) or in pairs with both orders.

Source: Zheng et al. 2023, arXiv:2306.05685. A directory holds question.jsonl, judge_prompts.jsonl and
reference_answer*.jsonl in FastChat's format: the official files, or the small set of deploy/evals/mt_bench_mini.
Prompts are filled exactly as FastChat fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_contracts.errors import ConfigError
from data_contracts.rows import ReportRow
from stages.evaluation.intervals import bootstrap
from stages.evaluation.judging import Judge, check_fields, read_rows
from stages.evaluation.rows import interval_row, report_row
from stages.scoring.verdicts import bracketed_rating, only_verdict

NEEDS_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
OTHER_TEMPERATURE = 0.7
MAX_NEW_TOKENS = 1024
JUDGE_OPTIONS = {"temperature": 0.0, "max_tokens": 2048}

Answers = Mapping[Any, Sequence[str]]
"""question_id -> the answers to both turns."""
Generate = Callable[[Sequence[list[dict[str, str]]], Sequence[float], int], Sequence[str]]
"""(conversations, a temperature for each, max_new_tokens) -> a completion of each."""


class Bench(NamedTuple):
    """The files of the benchmark."""

    questions: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]
    """Judge prompts by name."""
    references: dict[Any, list[str]]
    """question_id -> the reference answers to both turns."""


def load(directory: str | Path, limit: int | None = None) -> Bench:
    """Read the files of a directory.

    Raises: ConfigError for a missing file, a question without two turns, or one that needs a reference and has none.
    """
    root = Path(directory)
    questions, prompts = read_rows(root / "question.jsonl"), read_rows(root / "judge_prompts.jsonl")
    files = sorted([*root.glob("reference_answer*.jsonl"), *root.glob("reference_answer/*.jsonl")])
    references = {row["question_id"]: row["choices"][0]["turns"] for path in files for row in read_rows(path)}
    check_fields(root / "question.jsonl", questions, ("category",))
    check_fields(root / "judge_prompts.jsonl", prompts, ("name", "system_prompt", "prompt_template"))
    for number, question in enumerate(questions):
        name = question.get("question_id")
        if name is None or not isinstance(question.get("turns"), list):
            raise ConfigError(
                f"{root}/question.jsonl: row {number} has no `question_id` and `turns`: fetch the file again"
            )
        if len(question["turns"]) != 2:
            raise ConfigError(
                f"{root}/question.jsonl: question {name} has {len(question['turns'])} turns; MT-Bench asks two"
            )
        if question["category"] in NEEDS_REFERENCE and name not in references:
            raise ConfigError(
                f"{root}: question {name} ({question['category']}) needs a reference answer, "
                "and no reference_answer*.jsonl has one"
            )
    return Bench(questions[:limit], {row["name"]: row for row in prompts}, references)


def load_answers(path: Path, bench: Bench) -> dict[Any, list[str]]:
    """A model's answers in FastChat's format. Raises: ConfigError for a question without an answer to both turns."""
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in read_rows(path)}
    for question in bench.questions:
        if len(answers.get(question["question_id"], ())) != 2:
            raise ConfigError(f"{path} has no answers to both turns of question {question['question_id']}")
    return answers


def answer(bench: Bench, generate: Generate) -> dict[Any, list[str]]:
    """The policy's answers: all first turns, then all second turns with their history."""
    temperatures = [TEMPERATURES.get(question["category"], OTHER_TEMPERATURE) for question in bench.questions]
    conversations: list[list[dict[str, str]]] = [[] for _ in bench.questions]
    for turn in range(2):
        for conversation, question in zip(conversations, bench.questions, strict=True):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        completions = generate(conversations, temperatures, MAX_NEW_TOKENS)
        for conversation, text in zip(conversations, completions, strict=True):
            conversation.append({"role": "assistant", "content": text.strip()})
    return {
        question["question_id"]: [message["content"] for message in conversation if message["role"] == "assistant"]
        for question, conversation in zip(bench.questions, conversations, strict=True)
    }


def single_prompt(bench: Bench, question: Mapping[str, Any], answers: Sequence[str], turn: int) -> list[dict[str, str]]:
    """The messages with which the judge grades turn 1 or 2."""
    fields = {"question": question["turns"][0], "answer": answers[0]} if turn == 1 else {}
    fields |= _numbered("question", question["turns"]) | _numbered("answer", answers)
    return _messages(bench, question, turn, ("single-v1", "single-math-v1"), fields)


def pair_prompt(
    bench: Bench, question: Mapping[str, Any], answers_a: Sequence[str], answers_b: Sequence[str], turn: int
) -> list[dict[str, str]]:
    """The messages with which the judge compares two policies' turn 1 or 2."""
    fields = {"question": question["turns"][0], "answer_a": answers_a[0], "answer_b": answers_b[0]} if turn == 1 else {}
    fields |= _numbered("question", question["turns"])
    fields |= _numbered("answer_a", answers_a) | _numbered("answer_b", answers_b)
    return _messages(bench, question, turn, ("pair-v2", "pair-math-v1"), fields)


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    """{"name_1": first text, "name_2": second text}."""
    return {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}


def _messages(
    bench: Bench, question: Mapping[str, Any], turn: int, names: tuple[str, str], fields: dict[str, str]
) -> list[dict[str, str]]:
    """The judge's template with its fields filled. names: of the templates without and with a reference answer."""
    plain, with_reference = names
    name, reference = plain, None
    if question["category"] in NEEDS_REFERENCE:
        reference = bench.references.get(question["question_id"])
    if reference:
        name, fields = with_reference, fields | _numbered("ref_answer", reference)
    if turn == 2:
        name += "-multi-turn"
    template = bench.prompts[name]
    text = template["prompt_template"].format(**fields)
    return [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}]


def rating(judgment: str) -> float | None:
    """The first `[[7]]`, or else `rating: [7]`; None if the judge gave none, or none from 1 to 10.

    FastChat takes any first `[7]` for the rating, a reference to a source too.
    """
    value = bracketed_rating(judgment)
    if value is None or not 1 <= value <= 10:
        return None
    return value


def verdict(judgment: str) -> str | None:
    """A, B or tie; None without a verdict, or with several: FastChat prefers A to B to a tie then."""
    letter = only_verdict(judgment, "ABC")
    return "tie" if letter == "C" else letter


def judge_singly(bench: Bench, answers: Answers, judge: Judge) -> list[dict[str, Any]]:
    """A row {"question_id", "category", "turn", "score"} per judgment; the score is None where it failed."""
    games = [(question, turn) for question in bench.questions for turn in (1, 2)]
    prompts = [single_prompt(bench, question, answers[question["question_id"]], turn) for question, turn in games]
    rows = []
    for (question, turn), reply in zip(games, judge.ask(prompts, **JUDGE_OPTIONS), strict=True):
        score = None if reply is None else rating(reply.text)
        rows.append(_row(question, turn, score=score))
    return rows


def judge_in_pairs(bench: Bench, answers: Answers, baseline: Answers, judge: Judge) -> list[dict[str, Any]]:
    """A row {"question_id", "category", "turn", "outcome"} per question and turn.

    The outcome is 1 if the policy wins in both orders, 0 if it loses in both, else 1/2; None if either judgment failed.
    """
    games = [(question, turn) for question in bench.questions for turn in (1, 2)]
    prompts = []
    for question, turn in games:
        policy_turns, baseline_turns = answers[question["question_id"]], baseline[question["question_id"]]
        prompts.append(pair_prompt(bench, question, policy_turns, baseline_turns, turn))
        prompts.append(pair_prompt(bench, question, baseline_turns, policy_turns, turn))
    replies = judge.ask(prompts, **JUDGE_OPTIONS)
    verdicts = [None if reply is None else verdict(reply.text) for reply in replies]
    rows = []
    for (question, turn), first, second in zip(games, verdicts[::2], verdicts[1::2], strict=True):
        rows.append(_row(question, turn, outcome=_outcome(first, second)))
    return rows


def _outcome(policy_first: str | None, baseline_first: str | None) -> float | None:
    """The policy's result of two verdicts; it is A in the first and B in the second."""
    if policy_first is None or baseline_first is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((policy_first, baseline_first), 0.5)


def _row(question: Mapping[str, Any], turn: int, **result: float | None) -> dict[str, Any]:
    return {"question_id": question["question_id"], "category": question["category"], "turn": turn, **result}


def report(rows: Sequence[Mapping[str, Any]], judge: str, column: str = "score") -> list[ReportRow]:
    """Rows of eval_report: over all judgments, per turn, per category, and how many failed.

    Intervals are over questions. rows: of judge_singly (column "score") or of judge_in_pairs (column "outcome").
    """
    task, metric = {"score": ("mt_bench", "score"), "outcome": ("mt_bench_pairs", "win_rate")}[column]
    parts = {task: rows}
    for turn in (1, 2):
        parts[f"{task}/turn_{turn}"] = [row for row in rows if row["turn"] == turn]
    for category in sorted({row["category"] for row in rows}):
        parts[f"{task}/{category}"] = [row for row in rows if row["category"] == category]
    report_rows = []
    for name, part in parts.items():
        judged = [row for row in part if row[column] is not None]
        if not judged:
            continue
        questions: dict[Any, list[float]] = {}
        for row in judged:
            questions.setdefault(row["question_id"], []).append(row[column])
        # The number is the mean over judgments, as FastChat reports it; its interval comes from the questions' means.
        interval = bootstrap([float(np.mean(values)) for values in questions.values()])
        interval = interval._replace(mean=float(np.mean([row[column] for row in judged])))
        report_rows.append(interval_row("mt_bench", name, metric, interval, len(judged), judge))
    failed = sum(row[column] is None for row in rows)
    return [*report_rows, report_row("mt_bench", task, "failed_judgments", failed, len(rows), version=judge)]
