"""Texts that are nearly the same are found, in any script, also among thousands that begin alike; held-out prompts may not train.

Strategy: similarities are counted by hand; a brute-force comparison of all pairs is the oracle for random texts.
"""

import random
import time

import pytest

from data_contracts.errors import ConfigError
from data_contracts.near_duplicates import check_disjoint, jaccard, n_grams, near_duplicates
from data_contracts.prompts import prompt_row


def rows(**texts: str):
    return [{"prompt_id": name, "messages": [{"role": "user", "content": text}]} for name, text in texts.items()]


def test_similarity_is_the_share_of_common_word_triples():
    # "a b c d e" has abc bcd cde; "a b c d x" has abc bcd cdx: 2 common of 4.
    assert near_duplicates(["a b c d e"], ["a b c d x"], 0.5) == [(0, 0, 0.5)]
    assert near_duplicates(["a b c d e"], ["a b c d x"], 0.51) == []


def test_case_punctuation_and_blanks_do_not_make_a_difference():
    assert near_duplicates(["Name THREE fruits, please!"], ["name  three\nfruits please"], 1.0) == [(0, 0, 1.0)]


def test_texts_of_one_or_two_words_are_compared_as_a_whole():
    assert near_duplicates(["Hello there"], ["hello there!", "hello", "there hello"], 0.1) == [(0, 0, 1.0)]


def test_every_pair_above_the_threshold_is_found_in_order():
    left, right = ["one two three", "x y z", "one two three four"], ["x y z", "one two three"]
    assert near_duplicates(left, right, 0.5) == [(0, 1, 1.0), (1, 0, 1.0), (2, 1, 0.5)]


def test_texts_without_words_are_all_alike():
    assert near_duplicates(["???"], ["!!!"], 1.0) == [(0, 0, 1.0)]


def test_a_heldout_prompt_with_a_training_id_is_refused():
    with pytest.raises(
        ConfigError, match=r"1 prompt id\(s\) are both in the training and in the held-out file, e\.g\. \['b'\]"
    ):
        check_disjoint(rows(a="one two three", b="four five six"), rows(b="seven eight nine", c="ten eleven twelve"))


def test_a_heldout_prompt_with_a_training_text_is_refused_by_both_names():
    with pytest.raises(ConfigError, match=r"1 held-out prompt\(s\) .*'h' and 'b' \(similarity 1\.00, limit 0\.8\)"):
        check_disjoint(rows(a="one two three", b="Four five six!"), rows(h="four five six", i="ten eleven twelve"))


def test_disjoint_prompts_pass():
    check_disjoint(rows(a="one two three", b="four five six"), rows(h="seven eight nine"))


def test_prompts_without_ids_are_named_by_their_words_not_by_an_id_that_nobody_wrote():
    text = "Name three rivers of Europe that flow into the Black Sea, and say where each of them rises."
    row = prompt_row([{"role": "user", "content": text}])
    with pytest.raises(ConfigError) as refused:
        check_disjoint([row], [row])
    assert row["prompt_id"] not in str(refused.value)
    assert "e.g. 'Name three rivers of Europe that flow into the Black Sea, an...' and" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("请用三句话解释一下光合作用的过程", "请用五句话解释一下光合作用的过程"),
        ("空はなぜ青いのか説明してください", "空はなぜ赤いのか説明してください"),
        ("ทำไมท้องฟ้าจึงเป็นสีฟ้า", "ทำไมท้องฟ้าจึงเป็นสีดำ"),
    ],
)
def test_scripts_without_spaces_are_compared_by_characters(text, changed):
    assert [pair[:2] for pair in near_duplicates([text], [changed, "你好世界再见", "Why is the sky blue?"], 0.75)] == [
        (0, 0)
    ]


def test_one_character_of_seventeen_may_differ():
    # 17 different characters: 17 single ones and 16 pairs. Another one in the middle changes 1 and 2 of them: 30 of 36 are common.
    text = "一二三四五六七八九十百千万亿天地人"
    assert len(set(text)) == 17
    assert near_duplicates([text], [text[:8] + "水" + text[9:]], 0.8) == [(0, 0, 30 / 36)]


def test_words_among_chinese_characters_count_as_words():
    assert n_grams("用 Python 写 hello world") == n_grams("用python写HELLO。WORLD")
    assert n_grams("用 Python 写 hello world") != n_grams("用 Python 写 hello there")


def test_all_pairs_are_found_that_a_comparison_of_all_finds():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(150)]
    left, right = texts[:9], texts  # few enough that no n-gram counts as an instruction
    for threshold in (0.1, 1 / 3, 0.5, 0.8, 1.0):
        expected = [
            (i, j, similarity)
            for i, x in enumerate(left)
            for j, y in enumerate(right)
            if (similarity := jaccard(n_grams(x), n_grams(y))) >= threshold
        ]
        assert near_duplicates(left, right, threshold) == expected


INSTRUCTION = " ".join(f"rule{number}" for number in range(120))


def with_instruction(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{INSTRUCTION} {' '.join(draw.choices([f'word{n}' for n in range(900)], k=12))}" for _ in range(count)]


def test_a_long_instruction_before_every_prompt_makes_no_duplicates_and_hides_none():
    train, heldout = with_instruction(2000, seed=0), with_instruction(50, seed=1)
    assert jaccard(n_grams(train[0]), n_grams(heldout[0])) > 0.8
    heldout[7] = train[300]
    heldout[8] = train[400].rsplit(" ", 1)[0] + " other"
    assert [pair[:2] for pair in near_duplicates(heldout, train, 0.8)] == [(7, 300), (8, 400)]


def test_prompts_that_are_nothing_but_the_instruction_are_equal():
    train, heldout = with_instruction(30, seed=0), [*with_instruction(30, seed=1), INSTRUCTION]
    assert near_duplicates(heldout, [*train, INSTRUCTION], 0.8) == [(30, 30, 1.0)]


def test_twenty_thousand_prompts_and_five_hundred_held_out_with_one_instruction_take_seconds():
    train, heldout = with_instruction(20_000, seed=0), with_instruction(500, seed=1)
    began = time.process_time()
    assert near_duplicates(heldout, train, 0.8) == []
    assert time.process_time() - began <= 5
