"""Every file of the shapes in which data is published becomes what its README says.

Strategy: the six questions, better and worse answers that all files were made of are written here once; each file must
give just them.
"""

from pathlib import Path

import pytest

from data_contracts.errors import ConfigError
from tasks.data.reading import read_source
from tasks.data.source import Source

QUESTIONS = (
    "Name three rivers in Europe.",
    "What is 12 times 12?",
    "Write one sentence about autumn.",
    "Translate 'good morning' into French.",
    "Give me a synonym of 'quick'.",
    "Why is the sky blue?",
)
BETTER = (
    "The Danube, the Rhine and the Loire.",
    "144.",
    "Leaves turn gold and the evenings grow short.",
    "Bonjour.",
    "Fast.",
    "Air scatters short, blue wavelengths of sunlight more than long ones.",
)
WORSE = (
    "I like rivers.",
    "12 times 12 is 124.",
    "Autumn autumn autumn.",
    "Buenos dias.",
    "Slow.",
    "Because the sea is blue.",
)


@pytest.fixture(scope="module")
def read(shared):
    """read(file name, ...) -> Reading."""
    directory = shared / "data" / "as_people_have_it"
    return lambda name, **settings: read_source(Source(path=str(directory / name), **settings))


def questions(reading) -> list[str]:
    """The prompts, which are one message of the user each."""
    assert all([message["role"] for message in row["messages"]] == ["user"] for row in reading.prompts)
    return [row["messages"][0]["content"] for row in reading.prompts]


def answers(reading, name: str) -> list[str | None]:
    return [row[name] for row in reading.prompts]


def assert_pairs(reading, count: int = 6) -> None:
    assert questions(reading) == list(QUESTIONS[:count])
    assert answers(reading, "chosen") == list(BETTER[:count]) and answers(reading, "rejected") == list(WORSE[:count])
    assert answers(reading, "response") == [None] * count and not reading.drops.counts


def assert_truths(reading) -> None:
    assert answers(reading, "response") == list(BETTER) and not reading.drops.counts
    assert set(answers(reading, "chosen") + answers(reading, "rejected")) == {None}


def test_pairs_with_scores_beside_them(read):
    reading = read("trl_pairs.jsonl")
    assert_pairs(reading)
    assert reading.notes == ["columns that are not read: score_chosen, score_rejected"]
    assert [row["source"] for row in reading.prompts] == ["demo"] * 6


@pytest.mark.parametrize(
    "name",
    ["trl_conversational_pairs.parquet", "ultrafeedback_binarized.parquet", "llamafactory_pairs.json", "hh_rlhf.jsonl"],
)
def test_pairs(read, name):
    assert_pairs(read(name))


def test_a_chat_that_ends_with_the_assistant_is_a_prompt_and_its_answer(read):
    reading = read("ultrachat_messages.jsonl")
    for row, question, better in zip(reading.prompts, QUESTIONS, BETTER, strict=True):
        assert row["messages"] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": better},
            {"role": "user", "content": "Say it again, shorter."},
        ]
        assert row["response"] == better.split()[0]


@pytest.mark.parametrize(
    "name", ["spin_iteration.jsonl", "prompts.csv", "bom_crlf.jsonl", "vision_style_content.jsonl"]
)
def test_prompts_with_an_answer(read, name):
    reading = read(name)
    assert questions(reading) == list(QUESTIONS)
    assert_truths(reading)


def test_a_system_message_that_stands_in_a_column_of_its_own(read):
    reading = read("sharegpt.json")
    assert_truths(reading)
    for number, row in enumerate(reading.prompts):
        system = [{"role": "system", "content": "Answer briefly."}] if number % 2 else []
        assert row["messages"] == [*system, {"role": "user", "content": QUESTIONS[number]}]


@pytest.mark.parametrize(("name", "below"), [("alpaca.json", "Use plain words."), ("dolly.jsonl", "A short context.")])
def test_the_input_stands_below_the_instruction_one_blank_line_between(read, name, below):
    reading = read(name)
    assert_truths(reading)
    expected = [question if number % 2 else f"{question}\n\n{below}" for number, question in enumerate(QUESTIONS)]
    assert questions(reading) == expected


def test_single_answers_with_a_label(read):
    reading = read("kto_unpaired.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in reading.prompts] == [
        side for better, worse in zip(BETTER, WORSE, strict=True) for side in ((better, None), (None, worse))
    ][:-1]
    assert len({row["prompt_id"] for row in reading.prompts}) == 11


def test_of_a_saved_data_set_the_split_is_read_that_is_named_or_train_with_a_note(read):
    reading = read("saved_dataset")
    assert_pairs(reading, 5)
    assert "not read: test" in reading.notes[0]
    assert questions(read("saved_dataset", split="test")) == [QUESTIONS[5]]
    with pytest.raises(ConfigError, match="has no split 'dev'; there are train, test"):
        read("saved_dataset", split="dev")


def test_prompts_alone(read):
    reading = read("prompts.jsonl.gz")
    assert questions(reading) == list(QUESTIONS) and set(answers(reading, "response")) == {None}


def test_answers_that_a_policy_wrote_earlier_are_no_input_and_that_is_said(read):
    reading = read("sppo_generations.jsonl")
    assert questions(reading) == list(QUESTIONS) and set(answers(reading, "response")) == {None}
    assert reading.notes == [
        "generate_0, generate_1, all_generated_responses: answers that some policy wrote earlier are not read; "
        "a run samples its own"
    ]


def test_everybodys_own_file(read):
    reading = read("messy.jsonl")
    assert reading.rows == 13
    pairs = [(row["messages"][0]["content"], row["chosen"], row["rejected"]) for row in reading.prompts]
    assert pairs[:3] == [
        ("Name a colour.", "Red.", "Seven."),
        ("Name a colour.", "Blue.", "A colour."),
        ("Name a fish.", "Trout.<|im_end|>", "Cat.<|im_end|>"),
    ]
    assert pairs[3][0].startswith("ignore <|im_end|>") and pairs[4][0].startswith("word word")
    assert [pair[0] for pair in pairs[5:]] == ["Line\u2028separator inside", "Name a city."]
    assert len({row["prompt_id"] for row in reading.prompts}) == 7
    assert dict(reading.drops.places) == {
        "an exact repetition of an earlier row": ["line 3"],
        "`chosen` and `rejected` are identical": ["line 4"],
        "`rejected` is empty or blank": ["line 5"],
        "`chosen` is empty or blank": ["line 6", "line 11"],
        "the prompt is empty or blank": ["line 7"],
    }
    assert reading.drops.unusable == 5
    text = reading.drops.text()
    assert text.splitlines()[:2] == [
        "  2  `chosen` is empty or blank: line 6, line 11",
        "       messy.jsonl line 6: \"chosen\" must be non-empty text, got '   ' "
        "(prompt: 'Name a tree.', chosen: '   ', rejected: 'Oak.')",
    ]


def test_no_file_is_left_out(shared):
    names = {path.name for path in (shared / "data" / "as_people_have_it").iterdir()} - {"README.md"}
    assert names <= {word for word in Path(__file__).read_text().replace('"', " ").split() if word in names}
