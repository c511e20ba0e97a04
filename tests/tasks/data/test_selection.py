"""Which rows a run uses: shares, held-out parts and pairs are counted by hand on rows of a few words."""

import numpy as np
import pyarrow as pa
import pytest

from data_contracts.prompts import prompt_row
from data_contracts.shards import SCHEMAS
from tasks.data.prompt_set import PromptSet, batch_of
from tasks.data.selection import (
    NEARLY_HELD_OUT,
    different_prompts,
    mixed,
    near_heldout,
    paired,
    split_heldout,
    with_field,
    without,
)  # fmt: skip


def rows_of(*texts: str, **columns) -> PromptSet:
    return PromptSet.of([prompt_row([{"role": "user", "content": text}], **columns) for text in texts])


def test_columns_are_made_as_arrow_makes_them_of_rows():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où ? 🙂"}]
    rows = [
        prompt_row(turns[1:], response="There."),
        prompt_row(turns, chosen="Here.", rejected="No.\n"),
        prompt_row([*turns, {"role": "assistant", "content": "-"}, turns[1]], checks=[]),
    ]
    assert batch_of(rows).equals(pa.RecordBatch.from_pylist(rows, schema=SCHEMAS["prompts"]))
    assert batch_of([]).equals(pa.RecordBatch.from_pylist([], schema=SCHEMAS["prompts"]))


def numbered(prefix: str, count: int) -> PromptSet:
    return rows_of(*(f"{prefix} {number}" for number in range(count)))


def texts(prompts: PromptSet) -> list[str]:
    return [row["messages"][0]["content"] for row in prompts]


def pair(text: str, chosen: str | None, rejected: str | None, number: int):
    return prompt_row([{"role": "user", "content": text}], prompt_id=f"r{number}", chosen=chosen, rejected=rejected)


# --- a set of prompts


def test_a_set_of_prompts_is_a_sequence_of_rows_that_keep_their_places():
    prompts = numbered("p", 2500)
    assert len(prompts) == 2500 and texts(prompts[1998:2002]) == ["p 1998", "p 1999", "p 2000", "p 2001"]
    assert prompts[2400]["messages"][0]["content"] == "p 2400" and list(prompts)[2400] == prompts[2400]
    taken = prompts.take(np.array([0, 999, 1000, 2499]))
    assert texts(taken) == ["p 0", "p 999", "p 1000", "p 2499"]
    assert [taken.where(index) for index in range(4)] == ["row 1", "row 1000", "row 1001", "row 2500"]
    assert texts(taken[1:3]) == ["p 999", "p 1000"] and taken[1:3].where(0) == "row 1000"
    assert len(prompts[:0]) == 0 and list(prompts[:0]) == [] and prompts[:0].table().num_rows == 0
    with pytest.raises(IndexError):
        taken[4]


def test_joined_sets_name_the_file_of_each_row():
    first = PromptSet(numbered("a", 2).batches, np.array([[0, 1], [0, 2]]), ["a.jsonl"], "line")
    second = PromptSet(numbered("b", 2).batches, np.array([[0, 1], [1, 1]]), ["b0.jsonl", "b1.jsonl"], "line")
    both = PromptSet.joined([first, second])
    assert [both.where(index) for index in range(4)] == [
        "a.jsonl line 1",
        "a.jsonl line 2",
        "b0.jsonl line 1",
        "b1.jsonl line 1",
    ]


# --- mix and held-out part


@pytest.mark.parametrize(
    ("sizes", "weights", "limit", "expected"),
    [
        ((100, 100), (1, 1), None, (100, 100)),
        ((100, 30), (1, 1), None, (30, 30)),
        ((100, 100), (3, 1), None, (100, 33)),
        ((100, 100), (3, 1), 8, (6, 2)),
        ((100, 100, 100), (1, 1, 1), 10, (4, 3, 3)),
        ((10, 1000), (0.1, 0.9), None, (10, 90)),
    ],
)
def test_a_mix_takes_the_shares_that_the_weights_say(sizes, weights, limit, expected):
    parts = mixed([numbered(str(number), size) for number, size in enumerate(sizes)], weights, limit, seed=0)
    assert tuple(map(len, parts)) == expected


def test_a_mix_draws_by_seed():
    parts = [numbered("a", 500), numbered("b", 100)]
    drawn, again, other = (texts(mixed(parts, (1, 1), 50, seed)[0]) for seed in (0, 0, 1))
    assert drawn == again != other and len(set(drawn)) == 25


def test_the_held_out_part_holds_each_of_its_prompts_once_and_training_none_of_them():
    prompts = PromptSet.of([pair(f"p{number // 3}", f"a{number}", "b", number) for number in range(300)])
    train, heldout = split_heldout(prompts, 0.05, seed=0)
    assert len(heldout) == 5 and len(set(texts(heldout))) == 5 and len(train) == 285
    assert not set(texts(train)) & set(texts(heldout))
    assert {row["prompt_id"] for row in heldout} <= {f"r{3 * number}" for number in range(100)}
    assert texts(split_heldout(prompts, 0.05, seed=1)[1]) != texts(heldout)
    # Which prompts are held out depends on the prompts alone, not on their order.
    backwards = PromptSet.of(list(prompts)[::-1])
    assert set(texts(split_heldout(backwards, 0.05, seed=0)[1])) == set(texts(heldout))


def test_training_rows_that_are_nearly_held_out_are_dropped():
    train = rows_of("Name three rivers.", "Why is the sky blue?")
    near = near_heldout(train, rows_of("name three rivers!", "What is time?"), 0.8)
    train, drops = without(train, near, NEARLY_HELD_OUT)
    assert texts(train) == ["Why is the sky blue?"]
    assert drops.text() == (
        "  1  nearly a held-out prompt: row 1\n"
        "       row 1: 'Name three rivers.' and held-out 'name three rivers!' (similarity 1.00)"
    )


# --- what a pairing reads


def test_prompts_without_their_answers_are_used_once():
    prompts = numbered("p", 3)
    ids = [row["prompt_id"] for row in prompts]
    again = [{**row, "prompt_id": f"{row['prompt_id']}-{number}"} for number in (2, 3) for row in prompts]
    kept, drops = different_prompts(PromptSet.of([*prompts, *again]))
    assert [row["prompt_id"] for row in kept] == ids and (drops.counts.total(), drops.unusable) == (6, 0)
    written = PromptSet.of([pair("p", "a", "b", number) for number in range(3)])
    assert len(different_prompts(written)[0]) == 3  # with ids of their own they are meant to be three


def test_single_answers_with_labels_make_pairs_in_their_order():
    rows = [
        pair("p", "good 1", None, 0),
        pair("p", "good 2", None, 1),
        pair("q", None, "bad q", 2),
        pair("p", None, "bad 1", 3),
        pair("x", "both", "sides", 4),
        pair("p", None, "bad 2", 5),
        pair("q", "good q", None, 6),
        pair("p", None, "bad 3", 7),
    ]
    kept, drops = paired(PromptSet.of(rows))
    assert [(row["prompt_id"], row["chosen"], row["rejected"]) for row in kept] == [
        ("r0", "good 1", "bad 1"),
        ("r4", "both", "sides"),
        ("r1", "good 2", "bad 2"),
        ("r2", "good q", "bad q"),
    ]
    assert [kept.where(index) for index in range(4)] == ["row 1", "row 5", "row 2", "row 3"]
    assert [(places, drops.unusable) for places in drops.places.values()] == [(["row 8"], 1)]


def test_rows_without_what_is_trained_on_are_dropped():
    prompts = PromptSet.of([*rows_of("a", response="x"), *rows_of("b", "c")])
    kept, drops = with_field(prompts, "response", "no `response`")
    assert texts(kept) == ["a"] and dict(drops.places) == {"no `response`": ["row 2", "row 3"]}
