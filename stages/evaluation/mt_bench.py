"""Stages - MT-Bench: two-turn questions, judged singly (1 to 10) or in pairs with both orders (Zheng et al. 2023, arXiv:2306.05685).

A directory holds question.jsonl, judge_prompts.jsonl and reference_answer*.jsonl in FastChat's format: the official files, or the small
set of our own in deploy/evals/mt_bench_mini. Prompts are filled exactly as FastChat fills them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_contracts.errors import ConfigError
from stages.evaluation.intervals import bootstrap
from stages.evaluation.judging import Judge, ask_all, read_lines
from stages.evaluation.rows import report_row

NEEDS_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
OTHER_TEMPERATURE = 0.7
MAX_NEW_TOKENS = 1024
JUDGE_OPTIONS = {"temperature": 0.0, "max_tokens": 2048}

Answers = Mapping[Any, Sequence[str]]
"""question_id -> the answers to both turns."""


class Bench(NamedTuple):
    questions: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]
    """Judge prompts by name."""
    references: dict[Any, list[str]]


def load(directory: str | Path, limit: int | None = None) -> Bench:
    """Raises: ConfigError for a missing file, a question without two turns, or one that needs a reference and has none."""
    root = Path(directory)
    questions, prompts = read_lines(root / "question.jsonl"), read_lines(root / "judge_prompts.jsonl")
    files = sorted([*root.glob("reference_answer*.jsonl"), *root.glob("reference_answer/*.jsonl")])
    references = {row["question_id"]: row["choices"][0]["turns"] for path in files for row in read_lines(path)}
    for question in questions:
        name = question["question_id"]
        if len(question["turns"]) != 2:
            raise ConfigError(
                f"{root}/question.jsonl: question {name} has {len(question['turns'])} turns; MT-Bench asks two"
            )
        if question["category"] in NEEDS_REFERENCE and name not in references:
            raise ConfigError(
                f"{root}: question {name} ({question['category']}) needs a reference answer and no reference_answer*.jsonl has one"
            )
    return Bench(questions[:limit], {row["name"]: row for row in prompts}, references)


def load_answers(path: Path, bench: Bench) -> dict[Any, list[str]]:
    """A model's answers in FastChat's format. Raises: ConfigError for a question without an answer to both turns."""
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(path)}
    for question in bench.questions:
        if len(answers.get(question["question_id"], ())) != 2:
            raise ConfigError(f"{path} has no answers to both turns of question {question['question_id']}")
    return answers


Generate = Callable[[Sequence[list[dict[str, str]]], Sequence[float], int], Sequence[str]]
"""(conversations, a temperature each, max_new_tokens) -> a completion each."""


def answer(bench: Bench, generate: Generate) -> dict[Any, list[str]]:
    """The policy's answers: all first turns, then all second turns with their history."""
    temperatures = [TEMPERATURES.get(question["category"], OTHER_TEMPERATURE) for question in bench.questions]
    conversations: list[list[dict[str, str]]] = [[] for _ in bench.questions]
    for turn in range(2):
        for conversation, question in zip(conversations, bench.questions, strict=True):
            conversation.append({"role": "user", "content": question["turns"][turn]})
        for conversation, text in zip(
            conversations, generate(conversations, temperatures, MAX_NEW_TOKENS), strict=True
        ):
            conversation.append({"role": "assistant", "content": text.strip()})
    return {
        question["question_id"]: [message["content"] for message in conversation if message["role"] == "assistant"]
        for question, conversation in zip(bench.questions, conversations, strict=True)
    }


def single_prompt(bench: Bench, question: Mapping[str, Any], answers: Sequence[str], turn: int) -> list[dict[str, str]]:
    """What the judge reads to grade turn 1 or 2."""
    reference = bench.references.get(question["question_id"]) if question["category"] in NEEDS_REFERENCE else None
    template = bench.prompts["single-" + ("math-v1" if reference else "v1") + ("-multi-turn" if turn == 2 else "")]
    fields = {"question": question["turns"][0], "answer": answers[0]} if turn == 1 else {}
    fields |= {f"question_{i}": text for i, text in enumerate(question["turns"], 1)} | {
        f"answer_{i}": text for i, text in enumerate(answers, 1)
    }
    return _messages(template, fields, reference)


def pair_prompt(
    bench: Bench, question: Mapping[str, Any], answers_a: Sequence[str], answers_b: Sequence[str], turn: int
) -> list[dict[str, str]]:
    """What the judge reads to compare two policies' turn 1 or 2."""
    reference = bench.references.get(question["question_id"]) if question["category"] in NEEDS_REFERENCE else None
    template = bench.prompts["pair-" + ("math-v1" if reference else "v2") + ("-multi-turn" if turn == 2 else "")]
    fields = {"question": question["turns"][0], "answer_a": answers_a[0], "answer_b": answers_b[0]} if turn == 1 else {}
    fields |= {f"question_{i}": text for i, text in enumerate(question["turns"], 1)}
    for side, answers in (("a", answers_a), ("b", answers_b)):
        fields |= {f"answer_{side}_{i}": text for i, text in enumerate(answers, 1)}
    return _messages(template, fields, reference)


def _messages(
    template: Mapping[str, Any], fields: dict[str, str], reference: Sequence[str] | None
) -> list[dict[str, str]]:
    fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference or (), 1)}
    text = template["prompt_template"].format(**fields)
    return [{"role": "system", "content": template["system_prompt"]}, {"role": "user", "content": text}]


def rating(judgment: str) -> float | None:
    """`[[7]]` or `[7]`, the first of them; None: the judge gave none, or none from 1 to 10."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    value = float(match[1]) if match else None
    return value if value is not None and 1 <= value <= 10 else None


def verdict(judgment: str) -> str | None:
    """A, B or tie, as FastChat reads it; None: no verdict."""
    return next((name for mark, name in (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie")) if mark in judgment), None)


def judge_singly(bench: Bench, answers: Answers, judge: Judge) -> list[dict[str, Any]]:
    """{"question_id", "category", "turn", "score"} per judgment; score None: failed."""
    games = [(question, turn) for question in bench.questions for turn in (1, 2)]
    prompts = [single_prompt(bench, question, answers[question["question_id"]], turn) for question, turn in games]
    replies = ask_all(judge, prompts, **JUDGE_OPTIONS)
    return [
        _row(question, turn, score=None if reply is None else rating(reply.text))
        for (question, turn), reply in zip(games, replies, strict=True)
    ]


def judge_in_pairs(bench: Bench, answers: Answers, baseline: Answers, judge: Judge) -> list[dict[str, Any]]:
    """{"question_id", "category", "turn", "outcome"}: 1 if the policy wins in both orders, 0 if it loses in both, else 1/2; None: failed.

    A judgment that fails in one order fails as a whole.
    """
    games = [(question, turn) for question in bench.questions for turn in (1, 2)]
    prompts = []
    for question, turn in games:
        ours, theirs = answers[question["question_id"]], baseline[question["question_id"]]
        prompts += [pair_prompt(bench, question, ours, theirs, turn), pair_prompt(bench, question, theirs, ours, turn)]
    found = [None if reply is None else verdict(reply.text) for reply in ask_all(judge, prompts, **JUDGE_OPTIONS)]
    rows = []
    for (question, turn), *both in zip(games, found[::2], found[1::2], strict=True):
        outcome = None if None in both else 1.0 if both == ["A", "B"] else 0.0 if both == ["B", "A"] else 0.5
        rows.append(_row(question, turn, outcome=outcome))
    return rows


def _row(question: Mapping[str, Any], turn: int, **result: float | None) -> dict[str, Any]:
    return {"question_id": question["question_id"], "category": question["category"], "turn": turn, **result}


def report(rows: Sequence[Mapping[str, Any]], judge: str, column: str = "score") -> list[dict[str, Any]]:
    """Rows of eval_report: over all judgments, per turn, per category, and how many failed. Intervals are over questions."""
    task = "mt_bench" if column == "score" else "mt_bench_pairs"
    parts = {"": rows}
    parts |= {f"/turn_{turn}": [row for row in rows if row["turn"] == turn] for turn in (1, 2)}
    parts |= {
        f"/{name}": [row for row in rows if row["category"] == name]
        for name in sorted({row["category"] for row in rows})
    }
    out = []
    for name, part in parts.items():
        known = [row for row in part if row[column] is not None]
        if not known:
            continue
        questions: dict[Any, list[float]] = {}
        for row in known:
            questions.setdefault(row["question_id"], []).append(row[column])
        interval = bootstrap([float(np.mean(values)) for values in questions.values()])
        mean = float(np.mean([row[column] for row in known]))
        metric = {"score": "score", "outcome": "win_rate"}[column]
        out.append(
            report_row(
                "mt_bench", task + name, metric, mean, len(known), interval.stderr, interval.low, interval.high, judge
            )
        )
    out.append(
        report_row(
            "mt_bench", task, "failed_judgments", sum(row[column] is None for row in rows), len(rows), version=judge
        )
    )
    return out
