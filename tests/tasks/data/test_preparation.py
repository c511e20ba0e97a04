"""The prompts of a run: what its pairing cannot read is dropped or refused, what measures it never trains.

Strategy: files of a few rows; every number is counted by hand.
"""

import json

import pytest

from data_contracts.errors import ConfigError
from tasks.data.memory import Memory
from tasks.data.preparation import hold_out, prepare
from tasks.data.source import PromptsConfig


@pytest.fixture
def prepared(tmp_path):
    """prepared(reads, train rows, held-out rows or a share, ...) -> Prepared."""

    def make(reads, train, heldout=0.2, **settings):
        files = {}
        for name, rows in (("train", train), ("heldout", heldout)):
            files[name] = rows
            if isinstance(rows, list):
                path = tmp_path / f"{name}.jsonl"
                path.write_text("\n".join(map(json.dumps, rows)))
                files[name] = str(path)
        config = PromptsConfig(**files, **settings)
        return hold_out(prepare(config, 0, reads), config, 0, Memory(tmp_path))

    return make


def questions(count: int, **columns) -> list[dict]:
    words = ("river", "mountain", "colour", "bird", "tree", "stone", "city", "fish", "planet", "metal")
    return [{"prompt": f"Name one {words[number]}.", **columns} for number in range(count)]


def prompts_of(prompts) -> list[str]:
    return [row["messages"][0]["content"] for row in prompts]


def test_a_part_of_the_training_prompts_is_held_out(prepared):
    result = prepared("prompts", questions(10))
    assert len(result.train) == 8 and len(result.heldout) == 2
    assert not set(prompts_of(result.train)) & set(prompts_of(result.heldout))
    assert result.lines() == ["8 training prompts of 10 rows, 2 held-out prompts"] == [result.summary()]


def test_training_prompts_that_are_nearly_held_out_are_dropped_where_a_part_is_held_out(prepared):
    rows = questions(10) + [{"prompt": row["prompt"].upper()} for row in questions(10)]
    result = prepared("prompts", rows, 0.1)
    assert len(result.heldout) == 2 and result.drops.unusable == len(rows) - 2 - len(result.train) > 0
    assert not {text.upper() for text in prompts_of(result.train)} & {
        text.upper() for text in prompts_of(result.heldout)
    }
    assert set(result.drops.counts) == {"nearly a held-out prompt"}


def test_overlap_with_a_held_out_file_is_refused_or_dropped(prepared):
    with pytest.raises(ConfigError, match=r"2 held-out prompt\(s\) are \(nearly\) in the training set"):
        prepared("prompts", questions(10), questions(2))
    result = prepared("prompts", questions(10), questions(2), near_duplicates="drop")
    assert prompts_of(result.train) == prompts_of(result.train) and len(result.train) == 8
    assert result.counts() == {"source_rows": 10, "dropped": 2, "dropped/nearly a held-out prompt": 2}
    strict = PromptsConfig(train="train.jsonl", heldout="heldout.jsonl", max_drop_rate=0.1)
    with pytest.raises(ConfigError, match=r"or raise the limit; prompts\.duplicate_similarity says how near"):
        result.check(strict)


def test_what_was_compared_is_remembered(prepared, tmp_path, monkeypatch):
    first = prepared("prompts", questions(10))
    monkeypatch.setattr("tasks.data.preparation.near_heldout", lambda *_: pytest.fail("compared again"))
    assert list(prepared("prompts", questions(10)).train) == list(first.train)


def test_several_rows_of_one_prompt_are_one_prompt_where_their_answers_are_not_read(prepared):
    rows = [row | {"chosen": answer, "rejected": "x"} for row in questions(5) for answer in ("a", "b")]
    assert len(prepared("pair", rows).train) == 8
    result = prepared("prompts", rows)
    assert len(result.train) == 4 and result.drops.counts.total() == 5 and result.drops.unusable == 0


def test_held_out_prompts_are_different_ones(prepared):
    heldout = [{"prompt": "Why?", "chosen": answer, "rejected": "x"} for answer in "abc"]
    assert len(prepared("prompts", questions(5), heldout).heldout) == 1


@pytest.mark.parametrize(
    ("reads", "good", "other", "reason"),
    [
        ("response", {"response": "x"}, {}, "no `response`, which this run trains on"),
        (
            "pair",
            {"chosen": "x", "rejected": "y"},
            {"response": "x"},
            "no `chosen` and `rejected`, which this run trains on",
        ),
        ("answers", {"completion": "x", "label": True}, {"response": "x"}, "no answer, which this run trains on"),
    ],
)
def test_rows_that_lack_what_is_read_are_dropped_and_a_source_of_such_is_refused(prepared, reads, good, other, reason):
    heldout = [{"prompt": "What time is it?"}]
    result = prepared(reads, [*questions(3, **good), {"prompt": "Why?", **other}], heldout)
    assert len(result.train) == 3 and dict(result.drops.places) == {reason: ["line 4"]}
    with pytest.raises(ConfigError, match=r"none of the 3 prompts of .*train\.jsonl has a `"):
        prepared(reads, questions(3, **other), heldout)


def test_labelled_answers_are_pairs_for_methods_of_pairs(prepared):
    rows = [
        row | {"completion": answer, "label": answer == "good"} for row in questions(3) for answer in ("good", "bad")
    ]
    result = prepared("pair", rows[:-1], [{"prompt": "Why?"}])
    assert [(row["chosen"], row["rejected"]) for row in result.train] == [("good", "bad")] * 2
    assert list(result.drops.places.values()) == [["line 5"]]
    assert len(prepared("answers", rows[:-1], [{"prompt": "Why?"}]).train) == 5


def test_too_many_rows_that_cannot_be_used_stop_the_run(prepared):
    rows = questions(6) + [{"prompt": " "}] * 4
    result = prepared("prompts", rows, [{"prompt": "Why?"}])
    config = PromptsConfig(train="train.jsonl", heldout="heldout.jsonl")
    result.check(config)
    with pytest.raises(ConfigError, match=r"train.jsonl: 4 of 10 rows cannot be used \(limit: 40%"):
        result.check(config.model_copy(update={"max_drop_rate": 0.4}))
    assert result.lines()[:3] == [
        "6 training prompts of 10 rows, 1 held-out prompts",
        "training rows that are not used:",
        "  4  the prompt is empty or blank: line 7, line 8, line 9, line 10",
    ]
    assert result.summary() == (
        "6 training prompts of 10 rows, 1 held-out prompts; 4 training rows not used (4 the prompt is empty or blank); "
        "more in the report"
    )
