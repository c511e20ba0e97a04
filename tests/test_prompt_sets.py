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


def length_bounds(row) -> tuple[int, int | None]:
    """The fewest and the most words that a prompt's checks allow."""
    [check] = [check for check in checks_of(row) if check["name"] in ("words_between", "min_words")]
    return tuple(check["value"]) if check["name"] == "words_between" else (check["value"], None)


def test_every_prompt_asks_for_several_words_and_short_is_far_from_long():
    for row in BOTH:
        fewest, most = length_bounds(row)
        if row["source"].endswith("/short"):
            assert 3 <= fewest < most <= 9
        else:
            assert 12 <= fewest <= 24 and (most is None or most >= fewest + 10)


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_half_of_each_family_asks_for_short_and_half_for_long_answers(rows):
    counts = Counter(row["source"] for row in rows)
    families = {source.rsplit("/", 1)[0] for source in counts}
    assert len(families) == 13 and min(counts.values()) >= 3
    assert all(counts[f"{family}/short"] == counts[f"{family}/long"] for family in families)


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


def test_families_are_spread_so_that_any_52_prompts_in_a_row_hold_them_all():
    for rows in (TRAIN, HELDOUT):
        families = {row["source"] for row in rows}
        for start in range(len(rows) - 51):
            assert {row["source"] for row in rows[start : start + 52]} == families


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("why do frogs croak? answer briefly, with no capital letters.", "frogs croak to call a mate."),
        ("WHAT IS A SHADOW? BE BRIEF, AND USE ONLY CAPITAL LETTERS.", "A SHADOW IS A PLACE WITHOUT LIGHT."),
        ("Describe an ice rink. Make It a Short Title in Title Case.", "The Ice Rink at Night"),
        ("What is a mirror? Give three keywords as bullet points.", "- Glass\n- Light\n- Face"),
        ("What is a volcano? Give three single words as a numbered list.", "1. Lava\n2. Mountain\n3. Ash"),
        ("Which wild birds do you know? Name three:\n* bird\n* bird\n* bird", "* Robin\n* Owl\n* Eagle"),
        ("Name three big cities as a numbered list, just the names.", "1. Paris\n2. New York\n3. Tokyo"),
        (
            "What is a calendar? Use two bulleted sentences.",
            "- A calendar shows the days of a month.\n- It tells people when to pay and when to rest.",
        ),
        (
            "How do I calm a crying child? Two numbered sentences.",
            "1. Hold the child close and speak in a soft voice.\n2. Offer a warm drink and a favourite toy.",
        ),
        (
            "Tell a plumber about the leak, then ask him a question. Two sentences.",
            "There is a leak under our kitchen sink and the floor is wet. Can you come and repair it today?",
        ),
        ("What would a mouse yell at a cat? A short sentence with '!' at the end.", "You will never catch me!"),
        ("Write a short survey question about recycling plastic.", '"How often do you recycle plastic?"'),
        (
            "Do sloths move quickly? Write a short sentence that starts with 'No' and ends with '!'.",
            "No, sloths are slow!",
        ),
        (
            "Describe a lion. Answer in a short sentence without the word 'animal'.",
            "The lion is a proud hunter with a mane.",
        ),
        (
            "Describe a strawberry. Use at least 20 words, none of them 'red'.",
            "A strawberry is a small and juicy summer fruit with tiny seeds on its skin, and it tastes best with some cream.",
        ),
        (
            'Return JSON with the keys "mushroom" and "colour", one word each.',
            '{"mushroom": "morel", "colour": "brown"}',
        ),
        (
            'Answer in JSON with full sentences: {"before": ..., "after": ...}. It is about a haircut.',
            '{"before": "My hair was long and always in my eyes.", "after": "Now it is short and neat."}',
        ),
        (
            "How do fish breathe? Answer in exactly two full sentences.",
            "Fish take in water through the mouth and press it over their gills. There the oxygen passes into their blood.",
        ),
    ],
)
def test_a_proper_answer_earns_everything(prompt, completion):
    [checks] = [checks_of(candidate) for candidate in BOTH if text_of(candidate) == prompt]
    assert grade(completion, checks).score == 1.0


REPLIES = [
    (
        "It is a good thing.",
        "It is a good thing for many people in the world, and it has been a part of their daily life for long.",
    ),
    (
        "it is a good thing",
        "it is a good thing for many people in the world and it has been a part of our daily life for years",
    ),
    (
        "is it a good thing?",
        "Is it a good thing for many people in the world who have made it a part of their life for years?",
    ),
    (
        "it is a good thing to do!",
        "It is a good thing for everyone in the world! We are so happy to share it with all of our friends today!",
    ),
    (
        "The world is a place of wonder.",
        "The world is a wonderful place. It is full of people who help each other and enjoy the beauty of nature.",
    ),
    (
        "It is very important to us.",
        "This is an important part of our daily life. It helps people to stay healthy and brings them all together.",
    ),
]
"""Short and long replies that say nothing of any subject, in the style of a small model."""
LISTS = ["- good\n- things\n- here", "1. one\n2. two\n3. three"]


def mean_score(reply: str, rows) -> float:
    return sum(grade(reply, checks_of(row)).score for row in rows) / len(rows)


@pytest.mark.parametrize("reply", [*(reply for pair in REPLIES for reply in pair), *LISTS])
def test_no_single_reply_does_for_every_prompt(reply):
    assert mean_score(reply, BOTH) < 0.4


@pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])
def test_neither_short_nor_long_replies_win_by_themselves(rows):
    short, long = (sum(mean_score(pair[i], rows) for pair in REPLIES) / len(REPLIES) for i in (0, 1))
    assert abs(short - long) < 0.05


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
