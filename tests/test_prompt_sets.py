"""The files of deploy/: well-formed, disjoint, balanced, not to be won by one reply for everything."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_contracts.near_duplicates import near_duplicates
from data_contracts.prompts import text_of
from stages.scoring.checks import grade, validate_checks
from tasks.data.reading import read_source
from tasks.data.source import Source

DEPLOY = Path(__file__).parent.parent / "deploy"
READINGS = [
    read_source(Source(path=str(DEPLOY / "prompts" / f"quickstart_{name}.jsonl"))) for name in ("train", "heldout")
]
TRAIN, HELDOUT = (list(reading.prompts) for reading in READINGS)
BOTH = TRAIN + HELDOUT


def checks_of(row):
    return json.loads(row["checks"])


def texts_of(rows):
    return [text_of(row) for row in rows]


def test_every_row_is_used_and_every_column_read():
    for reading in READINGS:
        assert not reading.drops.counts and not reading.notes and not reading.ignored


def test_there_are_enough_prompts_with_ids_of_their_own():
    assert len(TRAIN) >= 320 and len(HELDOUT) >= 120
    assert len({row["prompt_id"] for row in BOTH}) == len(BOTH)


def test_no_text_occurs_twice():
    assert len({" ".join(text.casefold().split()) for text in texts_of(BOTH)}) == len(BOTH)


def test_no_heldout_prompt_is_nearly_a_training_prompt():
    assert near_duplicates(texts_of(HELDOUT), texts_of(TRAIN), 0.6) == []


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_no_two_prompts_of_a_file_are_near_duplicates(rows):
    assert [hit for hit in near_duplicates(texts_of(rows), texts_of(rows), 0.8) if hit[0] != hit[1]] == []


def test_every_prompt_is_short_and_its_checks_are_valid():
    for row in BOTH:
        validate_checks(checks_of(row))
        assert 2 <= len(checks_of(row)) <= 4
        assert len(text_of(row).split()) <= 25


def test_every_prompt_asks_for_several_words():
    for row in BOTH:
        [bounds] = [check["value"] for check in checks_of(row) if check["name"] == "words_between"]
        assert 3 <= bounds[0] < bounds[1] <= 14


def test_every_prompt_measures_its_subject_or_whether_it_ended():
    for row in BOTH:
        assert {"on_topic", "finished"} & {check["name"] for check in checks_of(row)}


def test_a_word_that_a_check_wants_or_bans_is_named_in_the_prompt():
    for row in BOTH:
        for check in checks_of(row):
            if check["name"] in ("starts_with", "contains", "avoids"):
                assert check["value"].casefold() in text_of(row).casefold()


def test_both_files_have_the_same_families_in_like_shares():
    train, heldout = (Counter(row["source"] for row in rows) for rows in (TRAIN, HELDOUT))
    assert train.keys() == heldout.keys()
    for family, count in train.items():
        assert abs(count / len(TRAIN) - heldout[family] / len(HELDOUT)) < 0.02, family


def test_families_are_spread_so_that_any_64_prompts_in_a_row_hold_them_all():
    for rows in (TRAIN, HELDOUT):
        families = {row["source"] for row in rows}
        for start in range(len(rows) - 63):
            assert {row["source"] for row in rows[start : start + 64]} == families


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (
            "What do owls eat? Answer in at most 14 words, in lowercase letters only.",
            "owls eat mice and other small animals.",
        ),
        ("Name three planets. Answer like this:\n- ...\n- ...\n- ...", "- Mars\n- Venus\n- Saturn"),
        (
            "Name one use for a hammer in one short sentence that ends with a full stop.",
            "A hammer drives nails into wood.",
        ),
        (
            "Write a short apology for breaking a cup. Say 'sorry' in it.",
            "I am so sorry that I broke your cup.",
        ),
        (
            "What does a lost tourist ask? Write down that one short question.",
            '"Excuse me, where is the station?"',
        ),
        (
            "What would a mouse yell at a cat? Short sentence, exclamation mark at the end.",
            "You will never catch me!",
        ),
        (
            "Why do cats climb trees? Start your short answer with 'Cats'.",
            "Cats climb trees to hunt and feel safe.",
        ),
        (
            "Describe a lion in one short sentence that avoids the word 'animal'.",
            "The lion is a proud hunter with a golden mane.",
        ),
        ("Name three big cities as a numbered list, just the names.", "1. Paris\n2. New York\n3. Tokyo"),
        (
            "What do carpenters make? Short sentence please. Leave commas out.",
            "Carpenters make tables and chairs.",
        ),
    ],
)
def test_a_proper_answer_earns_everything(prompt, completion):
    [checks] = [checks_of(candidate) for candidate in BOTH if text_of(candidate) == prompt]
    assert grade(completion, checks).score == 1.0


@pytest.mark.parametrize(
    "sentence",
    [
        "It is a good thing.",
        "it is a good thing",
        "is it a good thing?",
        "it is a good thing to do!",
        "- good\n- things\n- here",
        "1. one\n2. two\n3. three",
    ],
)
def test_no_single_reply_does_for_every_prompt(sentence):
    scores = [grade(sentence, checks_of(row)).score for row in BOTH]
    assert sum(scores) / len(scores) < 0.6


def test_the_multiple_choice_questions_are_well_formed_and_their_answers_are_spread():
    folder = DEPLOY / "evals" / "quickstart_mc"
    train, test = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "test")
    )
    assert (len(train), len(test)) == (8, 60)
    assert len({row["question"] for row in train + test}) == 68
    for row in train + test:
        assert row.keys() == {"question", "choices", "answer"}
        assert len(set(row["choices"])) == 4 and row["answer"] in range(4)
    assert Counter(row["answer"] for row in test) == {0: 15, 1: 15, 2: 15, 3: 15}
    task = yaml.safe_load((folder / "task.yaml").read_text(encoding="utf-8"))
    assert task["dataset_kwargs"]["data_files"] == {"train": "train.jsonl", "test": "test.jsonl"}
    assert near_duplicates([row["question"] for row in train], [row["question"] for row in test], 0.6) == []
