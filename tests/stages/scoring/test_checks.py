"""Checks by hand: what each one accepts, what it refuses, and the partial credit in between."""

# ruff: noqa: RUF001 - typographic quotes, dashes and commas are part of the cases

import math
import time

import pytest

from data_contracts.errors import ConfigError
from stages.scoring import verifiable
from stages.scoring.checks import CHECKS, Completion, Graded, grade, repetition, validate_checks


def credit(name, text, value=None, finished=True):
    spec = {"name": name} if value is None else {"name": name, "value": value}
    validate_checks([spec])
    return grade(text, [spec], finished=finished).score


@pytest.mark.parametrize(
    ("name", "value", "text", "expected"),
    [
        # words: list markers, lone punctuation and dashes are not words; hyphens and apostrophes do not cut
        ("max_words", 4, "Don't eat well-known mushrooms.", 1),
        ("max_words", 4, "one two three four five", 0.5),
        ("max_words", 4, "one two three four five six", 0),
        ("max_words", 4, "one two three four five six seven eight nine", 0),
        ("max_words", 2, "- red\r\n* blue", 1),
        ("max_words", 2, "1. red\n2) blue", 1),
        ("max_words", 3, "red — blue ... green !", 1),
        ("max_words", 2, "red—blue", 1),
        ("max_words", 2, "Größe naïve", 1),
        ("max_words", 1, "crème\u00a0brûlée", 0),
        ("words_between", [3, 4], "one two three", 1),
        ("words_between", [3, 4], "one two three four", 1),
        ("words_between", [3, 4], "one two three four five", 0.5),
        ("words_between", [1, 1], "yes", 1),
        # sentences: abbreviations and initials go on, closing quotes belong to theirs, a line ends one
        ("sentences", 1, "Dr. J. Smith came at 3.5 p.m. with fruit, e.g. apples.", 1),
        ("sentences", 2, "Really?! Yes.", 1),
        ("sentences", 2, '"Stop!" He ran.', 1),
        ("sentences", 2, "“Stop!” He ran…", 1),
        ("sentences", 2, "no full stop\r\nnor here", 1),
        ("sentences", 1, "Wait... ... .", 1),
        ("sentences", 2, "One. Two. Three.", 0.5),
        ("sentences", 2, "1. Red.\n2. Blue.", 1),
        ("sentences", 1, "We bought tea, milk, etc.", 1),
        ("max_sentences", 1, "One. Two.", 0),
        ("max_sentences", 4, "One. Two. Three. Four. Five.", 0.5),
        ("min_sentences", 2, "One.", 0.5),
        ("min_sentences", 2, "One. Two. Three.", 1),
        # layout
        ("paragraphs", 2, "one\r\n\r\ntwo", 1),
        ("paragraphs", 2, "one\n \n\n\ntwo\n", 1),
        ("paragraphs", 2, "one\ntwo", 0.5),
        ("single_line", None, "  one line \r\n", 1),
        ("single_line", None, "two\nlines", 0),
        ("single_line", None, "two\rlines", 0),
        ("bullet_count", 3, "- a\n* b\n• c", 1),
        ("bullet_count", 3, "· a\r\n  + b\r\n– c", 1),
        ("bullet_count", 2, "Here you go:\n- a\n- b\n", 1),
        ("bullet_count", 3, "- a\n- b", 2 / 3),
        ("bullet_count", 2, "- a\n- b\n- c", 0.5),
        ("bullet_count", 2, "-a\n**bold** b\n- \n---\nx - y", 0),
        ("bullet_count", 2, "1. a\n2. b", 0),
        ("numbered_list", 2, "1. a\n2. b", 1),
        ("numbered_list", 2, "Sure:\n 1) a\r\n 2) b", 1),
        ("numbered_list", 2, "1. a\n3. b", 0),
        ("numbered_list", 2, "2. a\n1. b", 0),
        ("numbered_list", 2, "1. a\n2.\n", 0.5),
        ("numbered_list", 3, "1.a 2.b 3.c", 0),
        ("numbered_list", 1, "1990 was warm", 0),
        # letters
        ("all_lowercase", None, "all small, être 3!", 1),
        ("all_lowercase", None, "One capital", 0.5),
        ("all_lowercase", None, "Two Capitals", 1 / 3),
        ("all_lowercase", None, "1 2 3", 0),
        ("all_lowercase", None, "你好", 0),
        ("all_uppercase", None, "WET PAINT! ÄÖ 2", 1),
        ("all_uppercase", None, "WET PAINt", 0.5),
        ("title_case", None, "The Lord of the Hills: A 2nd Tale\nand then some text", 1),
        ("title_case", None, "«Élan» 'Vital'", 1),
        ("title_case", None, "The lost dog", 0),
        ("title_case", None, "the Lost Dog", 0),
        ("no_commas", None, "red and blue", 1),
        ("no_commas", None, "red, blue", 0.5),
        ("no_commas", None, "红，蓝、绿", 1 / 3),
        ("no_digits", None, "ten", 1),
        ("no_digits", None, "10", 1 / 3),
        ("no_digits", None, "x²", 0.5),
        # phrases
        ("starts_with", "Snow", "snow is cold", 1),
        ("starts_with", "Snow", "  “Snow,” she said", 1),
        ("starts_with", "Snow", "**Snow** is cold", 1),
        ("starts_with", "Snow", "Snowmen melt", 0),
        ("starts_with", "Snow", "The snow", 0),
        ("starts_with", "It's", "It’s late", 1),
        ("starts_with", "Once upon a time", "Once  upon a\ntime there", 1),
        ("starts_with", "- ", "- milk", 1),
        ("starts_with", "Straße", "STRASSE am See", 1),
        ("ends_with", ".", "It ends.", 1),
        ("ends_with", ".", 'He said "stop." \n', 1),
        ("ends_with", ".", "**It ends.**", 1),
        ("ends_with", ".", "It ends", 0),
        ("ends_with", ".", "It ends!", 0),
        ("ends_with", "!", "Go! 🎉", 0),
        ("ends_with", "home", "We came Home.", 1),
        ("ends_with", "home", "We came ‘home’!!", 1),
        ("ends_with", "home", "a mobilehome", 0),
        ("ends_with", "home", "home again", 0),
        ("ends_with", "THE END", "...\nThe end.", 1),
        ("contains", "rest", "Take a Rest, dear.", 1),
        ("contains", "rest", "the restful forest", 0),
        ("contains", "ice cream", "ICE\ncream!", 1),
        ("contains", "café", "a cafe\u0301 nearby", 1),
        ("contains", "C++", "I like C++.", 1),
        ("contains", ["sun", "sea"], "the sun", 0.5),
        ("contains", ["sun", "sea"], "the sea and sun", 1),
        ("avoids", "water", "waterfalls roar", 1),
        ("avoids", "water", "cold Water.", 0),
        ("avoids", ["sun", "sea"], "the sea", 0),
        ("avoids", ["sun", "sea"], "sunny seas", 1),
        ("on_topic", ["cat", "purr"], "Purring calms them.", 1),
        ("on_topic", ["cat", "purr"], "They educate dogs.", 0),
        ("question", None, "Who is there?", 1),
        ("question", None, 'He asks, "Who?"', 1),
        ("question", None, "Who? Me.", 0),
        # JSON: bare or fenced, but all of the text; keys are graded
        ("json_object", ["a"], '{"a": 1}', 1),
        ("json_object", ["a"], '```json\n{"a": [1, 2]}\n```', 1),
        ("json_object", ["a"], '\r\n```\r\n{"a": null}\r\n```\r\n', 1),
        ("json_object", ["a", "b", "c"], '{"a": 1, "x": 2}', 0.5),
        ("json_object", ["a"], "{“a”: 1}", 0),
        ("json_object", ["a"], '{"a": NaN}', 0),
        ("json_object", ["a"], '["a"]', 0),
        ("json_object", ["a"], 'Here: {"a": 1}', 0),
        ("json_object", ["a"], '{"a": 1', 0),
        ("json_object", ["a"], '{"a":' * 5000, 0),
    ],
)
def test_credit_by_hand(name, value, text, expected):
    assert credit(name, text, value) == pytest.approx(expected)


def test_min_words_counts_twice_for_its_own_shortfall():
    # credit 2/4, and the text keeps the 2/4 share of its score that it has of the words
    assert credit("min_words", "one two", 4) == pytest.approx(0.25)
    assert credit("min_words", "one two three four five", 4) == 1


def test_finished_is_about_how_the_text_ended_not_about_its_last_letter():
    assert credit("finished", "cut in the mid", finished=True) == 1
    assert credit("finished", "It ends.", finished=False) == 0


def test_score_is_the_mean_credit_and_passed_keeps_the_order():
    specs = [
        {"name": "no_commas"},
        {"name": "question"},
        {"name": "max_words", "value": 4},
        {"name": "finished"},
    ]
    graded = grade("red, blue, one two three", specs)
    assert graded.passed == (False, False, False, True)
    assert graded.score == pytest.approx((1 / 3 + 0 + 0.5 + 1) / 4)


@pytest.mark.parametrize("text", ["", " \n\t\r\n", "...", "!!!", "🎉", "- \n- ", "```\n```"])
def test_silence_wins_nothing(text):
    specs = [
        {"name": "no_commas"},
        {"name": "avoids", "value": "x"},
        {"name": "max_words", "value": 9},
        {"name": "finished"},
    ]
    assert grade(text, specs) == Graded(0.0, (False,) * 4)


def test_one_word_is_not_most_of_an_answer():
    specs = [{"name": "words_between", "value": [4, 12]}, {"name": "all_lowercase"}, {"name": "finished"}]
    assert grade("yes", specs).score == pytest.approx(0.25 * (0.25 + 1 + 1) / 3)
    assert grade("owls eat mice at night", specs) == Graded(1.0, (True, True, True))


def test_every_check_stays_within_bounds_on_strange_text():
    values = {
        "a whole number above 0": 3,
        "two whole numbers above 0, [least, most]": [2, 5],
        "a non-empty text": "(x",
    }
    texts = [
        "",
        "x",
        "\ud800",
        "\u2028a\u0085b",
        "1. " * 400,
        "{" * 3000,
        "a" * 5000,
        "‮אבג",
        "?" * 50,
        "- a\n" * 500,
    ]
    for name, check in CHECKS.items():
        expected = check.argument.expected
        value = None if expected == "no value" else values.get(expected, ["(x", "y)"])
        validate_checks([{"name": name, "value": value}])
        for text in texts:
            assert 0 <= grade(text, [{"name": name, "value": value}]).score <= 1


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one check"),
        ([{"name": "max_word", "value": 3}], r"unknown check 'max_word'.*Did you mean 'max_words'\?"),
        ([{"name": "sonnet"}], "unknown check 'sonnet'; known: min_words"),
        ([{"name": "max_words"}], "'max_words' wants a whole number above 0; got None"),
        ([{"name": "max_words", "value": "3"}], "got '3'"),
        ([{"name": "max_words", "value": True}], "got True"),
        ([{"name": "max_words", "value": 3.0}], "got 3.0"),
        ([{"name": "max_words", "value": 0}], "got 0"),
        ([{"name": "words_between", "value": [5, 4]}], r"\[least, most\]; got \[5, 4\]"),
        ([{"name": "words_between", "value": 5}], "got 5"),
        ([{"name": "question", "value": True}], "wants no value; got True"),
        ([{"name": "contains", "value": "  "}], "got '  '"),
        ([{"name": "contains", "value": []}], r"got \[\]"),
        ([{"name": "contains", "value": ["a", 1]}], r"got \['a', 1\]"),
        ([{"name": "json_object", "value": "a"}], "list of texts"),
        ([{"name": "max_words", "valeu": 3}], "nothing more; got"),
        ([{"value": 3}], "nothing more; got"),
        (["max_words"], "nothing more; got 'max_words'"),
        ([{"name": "question"}, {"name": "max_words", "value": -1}], "got -1"),
    ],
)
def test_a_wrong_request_is_refused_with_what_was_wanted(specs, message):
    with pytest.raises(ConfigError, match=message):
        validate_checks(specs)


def test_every_check_says_what_it_does():
    assert all(check.doc and check.argument.expected for check in CHECKS.values())


@pytest.mark.parametrize("name", CHECKS)
def test_the_example_of_a_check_is_satisfied_by_its_own_answer(name):
    assert credit(name, CHECKS[name].answer, CHECKS[name].example) == 1


RHYMES = """
from stages.scoring.checks import NOTHING, Check

def _rhyme(answer, _):
    ends = [line.rstrip(".,!?")[-2:].lower() for line in answer.lines]
    return float(len(ends) > 1 and ends[0] == ends[1])

RHYMES = Check(_rhyme, NOTHING, "the first two lines end alike", answer="An owl at night,\\nits eyes are bright.")
"""


def test_a_check_of_another_package_grades_and_is_listed_with_its_example(outside_package, capsys):
    from flows.cli.commands import main

    points = {"rhymes": "poetry:RHYMES", "gone": "poetry:NOTHING_OF_THE_KIND"}
    outside_package("poetry", RHYMES, {"selfplay.checks": points})
    assert credit("rhymes", "An owl at night,\nits eyes are bright.") == 1 and credit("rhymes", "One.\nTwo.") == 0
    assert main(["checks"]) == 0
    shown = capsys.readouterr().out
    for name in CHECKS:
        assert f"\n{name:16} {CHECKS[name].doc}\n" in shown
    assert '"value": [2, 4]' in shown and "value: two whole numbers above 0, [least, most]" in shown
    assert '\nrhymes           the first two lines end alike\n                 {"name": "rhymes"}\n' in shown
    assert "\ngone             cannot be used: checks 'gone' is registered as 'poetry:NOTHING_OF_THE_KIND'" in shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("word", 0),
        ("the owl saw a mouse and the owl ate it", 0),  # two words twice are not yet a loop
        ("yes yes yes yes", 1),
        ("no no", 1),
        ("Ha, ha! HA", 1),
        ("a b c a b c a b c", 4 / 7),  # 7 3-grams, 3 distinct
        ("it is so it is so", 1 / 4),
        ("a" * 30, 1),
        ("had had it", 1 / 2),
    ],
)
def test_repetition_by_hand(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_a_long_loop_is_nearly_all_repetition():
    assert repetition("it is a magical, and " * 20) > 0.9
    assert repetition("A" * 30 + "B") > 0.9


LONG = 20_000
VALUES = {
    **dict.fromkeys(("min_words", "max_words", "min_sentences", "max_sentences", "sentences", "paragraphs"), 3),
    **dict.fromkeys(("bullet_count", "numbered_list"), 3),
    **dict.fromkeys(("starts_with", "ends_with", "contains", "avoids"), "dots"),
    **{"words_between": [3, 9], "on_topic": ["dot"], "json_object": ["a"]},
}
RUNS = (
    ".", " ", "\n", "\n ", "```\n", "_", "a", '."', ". ", "e.g. ", "a. ", "1. ", "[", "- ", "- a\n", '"', "-", "…", "!", ",",
    "a.", "x ......", '{"a":', "a\n\n",
)  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_an_answer_that_is_one_long_run_is_read_in_linear_time(run):
    """Once alone, once between words, once behind each list marker and fence: 15 s and more where a pattern begins anew
    at every character of the run.
    """
    text = run * (LONG // len(run))
    for answer in (text, f"word {text}b", f"a{text}a", f"- {text}", f"1. {text}", f"```{text}"):
        began = time.process_time()
        grade(answer, [{"name": name, "value": VALUES.get(name)} for name in CHECKS])
        repetition(answer)
        assert time.process_time() - began < 1.5  # all checks together take some 0.1 s


@pytest.mark.parametrize(
    ("text", "sentences", "words", "bullets"),
    [
        ("Well - known. Yes...", 2, 2, 0),
        ("- one\n  -   two\n- \n-three", 3, 3, 2),
        ("12345. x and 1) y", 1, 4, 0),
        ('He said "no.") Then (yes!?)... Then e.g. this.', 3, 8, 0),
        ("See p.m. and i.e. that? Oh. . .", 2, 6, 0),
    ],
)
def test_linear_patterns_read_what_the_plain_ones_read(text, sentences, words, bullets):
    """The numbers are those of the patterns before they were made linear."""
    completion = Completion(text)
    assert (completion.num_sentences, len(completion.words)) == (sentences, words)
    assert grade(text, [{"name": "bullet_count", "value": 2}]).score == max(0.0, 1 - abs(bullets - 2) / 2)


def test_a_check_that_does_not_end_leaves_its_answer_unscored(monkeypatch, scoring):
    def endless(completion, value):
        while "slow" in completion.text:
            pass
        return 1.0

    monkeypatch.setitem(CHECKS, "finished", CHECKS["finished"]._replace(credit=endless))
    monkeypatch.setattr(verifiable, "ANSWER_SECONDS", 0.2)
    candidates = scoring.candidates("why?", ["slow", "fast"])
    candidates.prompt["checks"] = '[{"name": "finished"}]'
    (scores,) = scoring.scorer({"name": "checks"}).score([candidates])
    assert math.isnan(scores.scores[0]) and scores.scores[1] == 1
    assert scores.reasons == ["checks took longer than 0.2 s", ""]
