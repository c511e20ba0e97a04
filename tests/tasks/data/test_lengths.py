"""Prompts that are too long, or that a template cannot write: refused, dropped or cut, as the settings say.

Strategy: a token is a word, so that lengths are counted by hand; the tiny model's own tokenizer counts in a process of
its own in one test.
"""

import json

import numpy as np
import pytest

import tasks.data.lengths
from data_contracts.errors import ConfigError
from data_contracts.prompts import prompt_row
from stages.sampling.prompt_lengths import PromptChecker, check_file, no_verdicts
from stages.sampling.stage import SamplingConfig
from tasks.data.drops import Drops
from tasks.data.lengths import OVERLONG, fit_to_model
from tasks.data.memory import Memory
from tasks.data.preparation import Prepared
from tasks.data.prompt_set import PromptSet
from tasks.data.source import PromptsConfig


def words(messages) -> list[int]:
    """Two tokens for each message, and one for each word."""
    if any(message["content"] == "refuse me" for message in messages):
        raise ConfigError("the template refuses it")
    return [0] * sum(2 + len(message["content"].split()) for message in messages)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def rows_of(*texts: str):
    return [{"messages": [user(text)]} for text in texts]


def test_only_prompts_that_might_be_too_long_are_counted():
    counted = []
    checker = PromptChecker(lambda messages: counted.append(messages) or words(messages), 30, False)
    rows = rows_of("short", "ß" * 3, "a " * 40, "b " * 13)
    assert checker.check(enumerate(rows)) == no_verdicts() | {"overlong": {2: 42}}
    # The template by itself, then what is not ASCII or might be too long; the first row needs no counting.
    assert counted == [[user("x")], *(row["messages"] for row in rows[1:])]


def test_a_prompt_that_the_template_refuses_is_named_with_the_reason():
    verdicts = PromptChecker(words, 3).check(enumerate(rows_of("refuse me", "one")))
    assert verdicts == no_verdicts() | {"unusable": {0: "the template refuses it"}}


def test_a_row_that_the_settings_drop_is_not_counted():
    checker = PromptChecker(
        words, 3, reason_to_drop=lambda row: "it is odd" if "odd" in row["messages"][0]["content"] else None
    )
    verdicts = checker.check(enumerate(rows_of("odd one with many words", "one")))
    assert verdicts == no_verdicts() | {"dropped": {0: "it is odd"}}


ASSISTANT = {"role": "assistant", "content": "fine fine fine"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("messages", "limit", "expected"),
    [
        ([user("a b c d e f")], 5, [user(" d e f")]),
        ([user("a b c"), ASSISTANT, user("d e")], 8, [user("d e")]),
        ([SYSTEM, user("a b c"), ASSISTANT, user("d e")], 8, [SYSTEM, user("d e")]),
        ([SYSTEM, user("a b c"), ASSISTANT, user("d e f g")], 8, [SYSTEM, user(" f g")]),
        ([SYSTEM, user("a b c")], 6, None),
        ([user("a b c")], 2, None),
    ],
)
def test_a_prompt_loses_its_oldest_turns_then_the_beginning_of_its_last_one(messages, limit, expected):
    shorter = PromptChecker(words, limit, True).shortened(messages)
    assert shorter == expected
    assert shorter is None or len(words(shorter)) <= limit


def test_long_files_are_shared_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.sampling.prompt_lengths.ROWS_PER_WORKER", 100)
    rows = [prompt_row([user(f"{number} " + "x " * (number % 50 == 7) * 20)]) for number in range(3000)]
    PromptSet.of(rows).write(tmp_path / "rows.arrow")
    result = check_file(str(tmp_path / "rows.arrow"), PromptChecker(words, 20))
    assert result["overlong"] == dict.fromkeys(range(7, 3000, 50), 23)


@pytest.fixture
def fit(tmp_path, tiny_model, monkeypatch):
    """fit(overlong, limit, texts ...) -> Prepared; the check runs in this process, with words for tokens."""

    def ask(sets, samplings, truncate, model, python, models):
        answers = []
        for number, (prompts, sampling) in enumerate(zip(sets, samplings, strict=True)):
            prompts.write(tmp_path / f"{number}.arrow")
            checker = PromptChecker(words, sampling["max_prompt_tokens"], truncate)
            answers.append(check_file(str(tmp_path / f"{number}.arrow"), checker))
        return json.loads(json.dumps(answers))

    monkeypatch.setattr(tasks.data.lengths, "_ask", ask)

    def fitted(overlong: str, *texts: str, heldout=("short",)) -> Prepared:
        train, held = (PromptSet.of([prompt_row([user(text)]) for text in side]) for side in (texts, heldout))
        prepared = Prepared(train, held, len(texts), Drops(), Drops(), [])
        config = PromptsConfig(train="x", heldout="y", overlong=overlong)
        sampling = SamplingConfig(max_prompt_tokens=6)
        return fit_to_model(prepared, config, (sampling, sampling), tiny_model, Memory(None))

    return fitted


LONG = "one two three four five six"


def test_long_prompts_are_refused_all_at_once_with_their_places_and_the_way_to_mend_it(fit):
    with pytest.raises(ConfigError) as refused:
        fit("refuse", "short", LONG, *(f"{LONG} {number}" for number in range(4)))
    assert str(refused.value).splitlines() == [
        "5 of 6 prompts are too long",
        *(
            f"  row {row}: the prompt '{text}' has {count} tokens, allowed are 1 to 6 (sampling.max_prompt_tokens; the "
            "model's context is 256)"
            for row, text, count in ((2, LONG, 8), (3, f"{LONG} 0", 9), (4, f"{LONG} 1", 9))
        ),
        "  Raise the limit, or set prompts.overlong to drop or truncate_left",
    ]


def test_long_prompts_are_dropped_and_counted(fit):
    prepared = fit("drop", "short", LONG, heldout=("short", LONG))
    assert len(prepared.train) == len(prepared.heldout) == 1
    assert dict(prepared.drops.places) == dict(prepared.heldout_drops.places) == {OVERLONG: ["row 2"]}
    assert prepared.counts() == {"source_rows": 2, "dropped": 1, f"dropped/{OVERLONG}": 1}


def test_long_prompts_lose_their_beginning_and_keep_their_place(fit):
    prepared = fit("truncate_left", "short", LONG)
    assert [row["messages"][0]["content"] for row in prepared.train] == ["short", " three four five six"]
    assert prepared.train.where(1) == "row 2" and not prepared.drops.counts
    assert prepared.notes == ["1 prompts were too long and lost their beginning (overlong: truncate_left)"]


def test_prompts_that_the_template_refuses_are_named(fit):
    with pytest.raises(ConfigError, match="1 prompts cannot be written by the template of .*\n  row 2: .*refuses it"):
        fit("drop", "short", "refuse me")


def test_what_was_counted_is_remembered_by_content_in_a_store_that_is_there(tmp_path):
    asked = []
    memory = Memory(tmp_path / "store")
    for question in ({"a": 1}, {"a": 1}, {"a": 2}):
        memory.recall(question, lambda: asked.append(1) or {"3": [1]})
    assert len(asked) == 3 and not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    for question in ({"a": 1}, {"a": 1}, {"a": 2}, {"a": 1}):
        assert memory.recall(question, lambda: asked.append(1) or {"3": [1]}) == {"3": [1]}
    assert len(asked) == 5
    [damaged] = list((tmp_path / "store" / "checked_prompts").iterdir())[:1]
    damaged.write_text("{")
    for number in (1, 2):
        memory.recall({"a": number}, lambda: asked.append(1) or {})
    assert len(asked) == 6


def test_the_tiny_models_own_tokenizer_counts_in_a_process_of_its_own(tiny_model):
    train = PromptSet.of([prompt_row([user(text)]) for text in ("short", "dogs " * 60, "sea " * 9)])
    prepared = Prepared(train, train.take(np.array([0])), 3, Drops(), Drops(), [])
    sampling = SamplingConfig(max_prompt_tokens=40, max_new_tokens=8)
    config = PromptsConfig(train="x", heldout="y", overlong="drop")
    fitted = fit_to_model(prepared, config, (sampling, sampling), tiny_model, Memory(None))
    assert [row["messages"][0]["content"][:3] for row in fitted.train] == ["sho", "sea"]
