"""MT-Bench: prompts against the official templates, verdicts as FastChat reads them, failures, and our question set.

Strategy for the prompts: an independent filling by plain text replacement, over the official files, for all 160
judgments of each kind.
"""

import json
from pathlib import Path

import pytest

from data_contracts.errors import ConfigError
from stages.evaluation.judging import JudgeReply
from stages.evaluation.mt_bench import (
    answer,
    judge_in_pairs,
    judge_singly,
    load,
    pair_prompt,
    rating,
    report,
    single_prompt,
    verdict,
)

OWN = Path(__file__).resolve().parents[3] / "deploy" / "evals" / "mt_bench_mini"


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture
def official(shared):
    return shared / "data" / "mt_bench"


def texts(question, side=""):
    """Answers that would break a naive filling."""
    return [
        f"Answer {side}{turn} to {question['question_id']}: {{question}} {{answer_1}} {{ref_answer_1}} \\n {{}}"
        for turn in (1, 2)
    ]


def replaced(template: str, fields: dict[str, str]) -> str:
    """Each {field} of the template by its text, from left to right, texts never looked at."""
    out, rest = [], template
    while rest:
        positions = {name: rest.find("{" + name + "}") for name in fields}
        next_fields = {name: position for name, position in positions.items() if position >= 0}
        if not next_fields:
            break
        name = min(next_fields, key=next_fields.get)
        out += [rest[: next_fields[name]], fields[name]]
        rest = rest[next_fields[name] + len(name) + 2 :]
    return "".join(out) + rest


@pytest.mark.parametrize("kind", ["single", "pair"])
def test_all_160_judge_prompts_are_the_official_templates_byte_for_byte(official, kind):
    bench = load(official)
    templates = {row["name"]: row for row in lines(official / "judge_prompts.jsonl")}
    references = {
        row["question_id"]: row["choices"][0]["turns"] for row in lines(official / "reference_answer_gpt-4.jsonl")
    }
    checked = with_reference = 0
    for question in lines(official / "question.jsonl"):
        for turn in (1, 2):
            needs = question["category"] in ("math", "reasoning", "coding")
            name = {
                "single": "single-math-v1" if needs else "single-v1",
                "pair": "pair-math-v1" if needs else "pair-v2",
            }[kind]
            template = templates[name + "-multi-turn" * (turn == 2)]
            q = question["turns"]
            fields = {"question": q[0], "question_1": q[0], "question_2": q[1]}
            if needs:
                fields |= {
                    "ref_answer_1": references[question["question_id"]][0],
                    "ref_answer_2": references[question["question_id"]][1],
                }
            if kind == "single":
                answers = texts(question)
                fields |= {"answer": answers[0], "answer_1": answers[0], "answer_2": answers[1]}
                messages = single_prompt(bench, question, answers, turn)
            else:
                a, b = texts(question, "a"), texts(question, "b")
                fields |= {"answer_a": a[0], "answer_b": b[0]}
                fields |= {"answer_a_1": a[0], "answer_a_2": a[1], "answer_b_1": b[0], "answer_b_2": b[1]}
                messages = pair_prompt(bench, question, a, b, turn)
            assert messages[0] == {"role": "system", "content": template["system_prompt"]}
            assert messages[1]["role"] == "user"
            assert messages[1]["content"].encode() == replaced(template["prompt_template"], fields).encode()
            checked, with_reference = checked + 1, with_reference + needs
    assert (checked, with_reference) == (160, 60)


@pytest.mark.parametrize(
    ("judgment", "value"),
    [
        ("Good. Rating: [[7]]", 7.0),
        ("Rating: [[8.5]] and later [[2]]", 8.5),
        ("see [3], Rating: [[6]]", 6.0),
        ("Rating: [4]", 4.0),
        ("Rating: 9", None),
        ("Rating: [[8,5]]", 8.5),
        ("see [1] and [2]. Rating: 9", None),
        ("as source [1] says, it is right", None),
        ("see [1] and [2]. **Rating**: [9]", 9.0),
        ("Rating: [[70]]", None),
        ("", None),
    ],
)
def test_ratings(judgment, value):
    assert rating(judgment) == value


def test_verdicts():
    assert [verdict(text) for text in ("[[A]]", "so [[B]]", "[[C]]", "A is better")] == ["A", "B", "tie", None]
    assert [verdict(text) for text in ("[[A]] and [[B]]", "[[A]], I say: [[ A ]]")] == [None, "A"]


def test_answers_are_asked_in_two_rounds_at_the_categories_temperature():
    bench, calls = load(OWN), []

    def generate(conversations, temperatures, limit):
        calls.append(([len(conversation) for conversation in conversations], list(temperatures), limit))
        return [f" turn {len(conversation) // 2 + 1} " for conversation in conversations]

    answers = answer(bench, generate)
    assert set(map(tuple, answers.values())) == {("turn 1", "turn 2")}
    assert [set(sizes) for sizes, _, _ in calls] == [{1}, {3}]
    temperatures = dict(zip([question["category"] for question in bench.questions], calls[0][1], strict=True))
    assert (temperatures["writing"], temperatures["stem"], temperatures["math"]) == (0.7, 0.1, 0.0)
    assert calls[0][2] == 1024


class Grader:
    """Gives every turn 1 an 8, every turn 2 a 6; is away for some questions, and talks instead of grading others."""

    name = "grader"

    def __init__(self, away=(), chatty=()):
        self.away, self.chatty = away, chatty

    def ask(self, conversations, **options):
        return [self.reply(messages, options) for messages in conversations]

    def reply(self, messages, options):
        assert options == {"temperature": 0.0, "max_tokens": 2048}
        body = messages[-1]["content"]
        if any(word in body for word in self.away):
            return None
        if any(word in body for word in self.chatty):
            return JudgeReply("I would rather not say.")
        return JudgeReply("Rating: [[6]]" if "<|The Start of Assistant A's Conversation" in body else "Rating: [[8]]")


def answers_of(bench, text):
    return {
        question["question_id"]: [f"{text} {question['question_id']} one", f"{text} {question['question_id']} two"]
        for question in bench.questions
    }


def test_a_score_is_the_mean_of_the_judgments_that_succeeded():
    bench = load(OWN)
    first, second = (question["question_id"] for question in bench.questions[:2])
    rows = judge_singly(bench, answers_of(bench, "mine"), Grader(away=[f"mine {first} "], chatty=[f"mine {second} "]))
    rows_by_metric = {(row["task"], row["metric"]): row for row in report(rows, "grader")}
    failed = rows_by_metric["mt_bench", "failed_judgments"]
    assert (failed["value"], failed["n"]) == (4.0, 2 * len(bench.questions))
    score = rows_by_metric["mt_bench", "score"]
    assert (score["value"], score["n"]) == (7.0, 2 * len(bench.questions) - 4)
    assert rows_by_metric["mt_bench/turn_1", "score"]["value"] == 8.0
    assert rows_by_metric["mt_bench/turn_2", "score"]["value"] == 6.0
    assert (f"mt_bench/{bench.questions[0]['category']}", "score") not in rows_by_metric
    assert {row["task_version"] for row in rows_by_metric.values()} == {"grader"}


def test_a_judge_that_is_away_gives_no_score_at_all():
    bench = load(OWN)
    rows = report(judge_singly(bench, answers_of(bench, "mine"), Grader(away=["mine"])), "grader")
    assert [(row["metric"], row["value"]) for row in rows] == [("failed_judgments", 2.0 * len(bench.questions))]


class Chooser:
    """Says which of two is better by a rule on where the word stands."""

    name = "chooser"

    def __init__(self, rule):
        self.rule = rule

    def ask(self, conversations, **options):
        return [self.reply(messages, options) for messages in conversations]

    def reply(self, messages, _):
        body = messages[-1]["content"]
        return JudgeReply(self.rule("A" if body.index("mine") < body.index("theirs") else "B"))


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [
        (lambda letter: f"[[{letter}]]", 1.0),  # the policy in both orders
        (lambda letter: "[[B]]" if letter == "A" else "[[A]]", 0.0),
        (lambda letter: "[[A]]", 0.5),  # always the first: a tie
        (lambda letter: "[[C]]", 0.5),
        (lambda letter: "[[A]]" if letter == "A" else "none", None),  # one order failed
    ],
)
def test_a_pair_is_won_only_in_both_orders(rule, outcome):
    bench = load(OWN)
    rows = judge_in_pairs(bench, answers_of(bench, "mine"), answers_of(bench, "theirs"), Chooser(rule))
    assert {row["outcome"] for row in rows} == {outcome}
    values = {(row["task"], row["metric"]): row["value"] for row in report(rows, "chooser", "outcome")}
    assert values.get(("mt_bench_pairs", "win_rate")) == outcome
    assert values["mt_bench_pairs", "failed_judgments"] == (len(rows) if outcome is None else 0)


def test_our_own_set_has_every_category_and_its_references():
    bench = load(OWN)
    assert len({question["category"] for question in bench.questions}) == len(bench.questions) == 8
    assert {
        question["question_id"]
        for question in bench.questions
        if question["category"] in ("math", "reasoning", "coding")
    } == set(bench.references)


@pytest.mark.parametrize("missing", ["question.jsonl", "judge_prompts.jsonl", "reference_answer.jsonl"])
def test_a_missing_file_is_named(tmp_path, missing):
    for path in OWN.glob("*.jsonl"):
        if path.name != missing:
            (tmp_path / path.name).write_text(path.read_text())
    with pytest.raises(ConfigError, match="reference" if "reference" in missing else missing):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("question.jsonl", "", "question.jsonl has no rows"),
        ("question.jsonl", '["one"]', "row 0 is str, expected an object"),
        ("question.jsonl", '{"question_id": 1, "category": null, "turns": ["a", "b"]}', "`category` of row 0 is null"),
        ("question.jsonl", '{"category": "stem"}', "row 0 has no `question_id` and `turns`"),
        ("judge_prompts.jsonl", '{"name": "single-v1"}', "`system_prompt` of row 0 is missing"),
    ],
)
def test_broken_files_are_refused_at_load(tmp_path, name, content, message):
    for path in OWN.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)
