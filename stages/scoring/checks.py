"""Stages - completion text -> score: verifiable instructions, small functions that need no model to be sure.

A prompt row carries `checks: [{"name": "max_words", "value": 12}, {"name": "all_lowercase"}]`.
`validate_checks` refuses a wrong request before anything runs; `grade` says how much of it a completion
satisfied. To add a check, write one small function and one line in `CHECKS`;
another package declares an entry point in the group `selfplay.checks` instead (docs/scoring.md has one).
The file is long (over 350 lines) because the checks are its one table, with the readings of a text that they share.

What counts as what:
- A *word* is a run between blanks (or dashes set as punctuation) that holds a letter or a digit; list markers
  are not words, "don't" and "well-known" are one each. Scripts written without blanks are not cut into words.
- A *sentence* ends at . ! ? … before a blank, or at a line break; "e.g." and initials do not end one.
- Phrases are compared caselessly and as whole words, curly quotes read as straight ones: "cats" does not
  contain "cat".

Credit is graded where a near miss is worth preferring to a wide one: too few of something earn
count / minimum; too many lose linearly, down to nothing at half as many again as allowed; characters that
must not be there (capitals, commas, digits) leave 1 / (1 + slips). Everything else is all or nothing, unless
its line in `CHECKS` says otherwise.
"""

# ruff: noqa: RUF001 - the typographic quotes, dashes and commas are what is being read here

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from data_contracts.errors import ConfigError
from stages.scoring.table import Table

_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'"})
_WRAPPING = " \n\"'*_`()[]"  # quotes, brackets and markdown emphasis around an answer are not part of it
# Every pattern is linear in the length of an answer: runs are possessive (`++`) and begin where the run does (`(?<!...)`),
# so that a run which leads nowhere is read once, not once from each of its characters.
_BULLET = re.compile(r"(?<!\s)\s*+[-*•·+–]\s++")
_NUMBER = re.compile(r"(?<!\s)\s*+(\d{1,3})[.)]\s++")
_FENCE = re.compile(r"```\w*+(\s*+)")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"')\]*_]*+(?:\s++|$)")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|etc|e\.g|i\.e|a\.m|p\.m|[^\W\d_])\.$", re.IGNORECASE)
_LONGEST_ABBREVIATION = 8
"""Characters before a full stop that decide whether it ends an abbreviation, with some to spare."""
_SMALL_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "but", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with")
)


@dataclass(frozen=True)
class Completion:
    """A completion and the readings of it that the checks share, each made once."""

    raw: str
    finished: bool = True

    @cached_property
    def text(self) -> str:
        """One form of every accent, quote and line end, no blanks around."""
        return unicodedata.normalize("NFC", "\n".join(self.raw.splitlines())).translate(_QUOTES).strip()

    @cached_property
    def bare(self) -> str:
        return self.text.strip(_WRAPPING)

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def items(self) -> list[str]:
        """The lines without their list markers."""
        return [_without_marker(_without_marker(line, _BULLET), _NUMBER) for line in self.lines]

    @cached_property
    def words(self) -> list[str]:
        return [run for line in self.items for run in re.split(r"\s+|[—–]+|--+", line) if _says_something(run)]

    @cached_property
    def num_sentences(self) -> int:
        return sum(_sentences_in(line) for line in self.items)


def _marker(line: str, pattern: re.Pattern[str], anywhere: bool = False) -> re.Match[str] | None:
    """A list marker at the start of the line (or anywhere in it) with a word after it."""
    match = pattern.search(line) if anywhere else pattern.match(line)
    return match if match and re.search(r"\w", line[match.end() :]) else None


def _without_marker(line: str, pattern: re.Pattern[str]) -> str:
    match = _marker(line, pattern, anywhere=True)
    return line if match is None else line[: match.start()] + line[match.end() :]


def _without_closing(text: str) -> str:
    """The text up to its last letter or digit."""
    end = len(text)
    while end and not text[end - 1].isalnum():
        end -= 1
    return text[:end]


def _says_something(text: str) -> bool:
    return any(char.isalnum() for char in text)


def _sentences_in(line: str) -> int:
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(line):
        is_last = end.end() == len(line)  # even an abbreviation ends its sentence there
        stop = end.start() + len(end.group().rstrip())
        if not is_last and _ABBREVIATION.search(line[max(start, stop - _LONGEST_ABBREVIATION) : stop]):
            continue
        count += _says_something(line[start : end.end()])
        start = end.end()
    return count + _says_something(line[start:])


# --- what a check measures: (completion, value) -> credit in [0, 1] ---


def _at_least(count: int, minimum: int) -> float:
    return min(1.0, count / minimum)


def _at_most(count: int, maximum: int) -> float:
    return max(0.0, 1.0 - 2 * max(0, count - maximum) / maximum)


def _exactly(count: int, expected: int) -> float:
    return max(0.0, 1.0 - abs(count - expected) / expected)


def _words_between(completion: Completion, bounds: Sequence[int]) -> float:
    return min(_at_least(len(completion.words), bounds[0]), _at_most(len(completion.words), bounds[1]))


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).translate(_QUOTES).casefold().split())


def _phrases(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _mentions(completion: Completion, phrase: str) -> bool:
    # \b would not hold beside a phrase that begins or ends with punctuation, such as "C++".
    return re.search(rf"(?<!\w){re.escape(_fold(phrase))}(?!\w)", _fold(completion.text)) is not None


def _contains(completion: Completion, value: str | Sequence[str]) -> float:
    mentions = [_mentions(completion, phrase) for phrase in _phrases(value)]
    return sum(mentions) / len(mentions)


def _avoids(completion: Completion, value: str | Sequence[str]) -> float:
    return float(not any(_mentions(completion, phrase) for phrase in _phrases(value)))


def _on_topic(completion: Completion, stems: Sequence[str]) -> float:
    return float(any(re.search(rf"(?<!\w){re.escape(_fold(stem))}", _fold(completion.text)) for stem in stems))


def _starts_with(completion: Completion, phrase: str) -> float:
    opening = re.compile(rf"{re.escape(_fold(phrase))}(?!\w)" if phrase[-1].isalnum() else re.escape(_fold(phrase)))
    return float(any(opening.match(_fold(text)) for text in (completion.text, completion.bare)))


def _ends_with(completion: Completion, phrase: str) -> float:
    ending = _fold(phrase)
    if ending[-1].isalnum():  # a word: the punctuation that closes its sentence is not in the way
        closed = _fold(_without_closing(completion.text))
        return float(re.search(rf"(?<!\w){re.escape(ending)}$", closed) is not None)
    return float(any(_fold(text).endswith(ending) for text in (completion.text, completion.bare)))


def _without(completion: Completion, is_slip: Callable[[str], bool]) -> float:
    return 1.0 / (1 + sum(map(is_slip, completion.text)))


def _one_case(completion: Completion, is_slip: Callable[[str], bool]) -> float:
    # Digits and scripts without case are neither lower nor upper: a cased letter must be there to be right.
    is_cased = any(char.isupper() or char.islower() for char in completion.text)
    return is_cased * _without(completion, is_slip)


def _title_case(completion: Completion) -> float:
    words = [re.sub(r"^[\W_]+", "", word) for word in Completion(completion.lines[0]).words]
    is_title = [
        word[0].isupper() or word[0].isdigit() or (i > 0 and word in _SMALL_WORDS) for i, word in enumerate(words)
    ]
    return float(bool(is_title) and all(is_title))


def _bullets(completion: Completion) -> int:
    return sum(_marker(line, _BULLET) is not None for line in completion.lines)


def _numbered_list(completion: Completion, expected: int) -> float:
    numbers = [int(match.group(1)) for line in completion.lines if (match := _marker(line, _NUMBER))]
    in_order = numbers == list(range(1, len(numbers) + 1))
    return _exactly(len(numbers), expected) if in_order else 0.0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _json_object(completion: Completion, keys: Sequence[str]) -> float:
    source = completion.raw.strip()  # not `completion.text`: a curly quote must not be repaired into JSON
    if fence := _FENCE.match(source):
        begin = fence.start(1) + fence[1].rfind("\n") + 1  # 0 characters of `fence[1]`: no line ends there
        if "\n" in fence[1] and source.endswith("```") and begin <= len(source) - 3:
            source = source[begin:-3]
    try:
        parsed = json.loads(source, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(parsed, dict):
        return 0.0
    return (1 + sum(key in parsed for key in keys)) / (1 + len(keys))


def _paragraphs(completion: Completion) -> int:
    return len(re.split(r"\n\s*\n", completion.text))


# --- the table ---


class Argument(NamedTuple):
    """What a check's `value` must be."""

    expected: str
    accepts: Callable[[Any], bool]


class Check(NamedTuple):
    """A verifiable instruction."""

    credit: Callable[[Completion, Any], float]
    """(completion, the prompt's `value`) -> credit in [0, 1]; 1: satisfied."""
    argument: Argument
    doc: str
    """What the instruction asks for."""
    example: Any = None
    """A `value` that it may have."""
    answer: str = ""
    """An answer that satisfies it with that value."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # bool is an int to isinstance


def _is_range(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_texts(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and all(map(_is_text, value))


NOTHING = Argument("no value", lambda value: value is None)
COUNT = Argument("a whole number above 0", _is_count)
RANGE = Argument("two whole numbers above 0, [least, most]", _is_range)
TEXT = Argument("a non-empty text", _is_text)
TEXTS = Argument("a non-empty list of texts", _is_texts)
PHRASES = Argument("a non-empty text or a list of them", lambda value: _is_text(value) or _is_texts(value))

CHECKS: dict[str, Check] = {
    "min_words": Check(
        lambda r, n: _at_least(len(r.words), n), COUNT, "at least n words; graded", 3, "owls hunt at night"
    ),
    "max_words": Check(lambda r, n: _at_most(len(r.words), n), COUNT, "at most n words; graded", 3, "owls hunt mice"),
    "words_between": Check(
        _words_between, RANGE, "a number of words within the range, ends included; graded", [2, 4], "owls hunt mice"
    ),
    "min_sentences": Check(
        lambda r, n: _at_least(r.num_sentences, n), COUNT, "at least n sentences; graded", 2, "Owls hunt. Mice hide."
    ),
    "max_sentences": Check(
        lambda r, n: _at_most(r.num_sentences, n), COUNT, "at most n sentences; graded", 2, "Owls hunt."
    ),
    "sentences": Check(
        lambda r, n: _exactly(r.num_sentences, n), COUNT, "exactly n sentences; graded", 2, "Owls hunt. Mice hide."
    ),
    "paragraphs": Check(
        lambda r, n: _exactly(_paragraphs(r), n),
        COUNT,
        "exactly n blocks between blank lines; graded",
        2,
        "Owls hunt.\n\nMice hide.",
    ),
    "bullet_count": Check(
        lambda r, n: _exactly(_bullets(r), n),
        COUNT,
        "exactly n lines marked - * • · + or –; graded",
        2,
        "- owls\n- mice",
    ),
    "numbered_list": Check(
        _numbered_list, COUNT, "exactly n lines numbered 1. 2. ... or 1) 2) ...; graded", 2, "1. owls\n2. mice"
    ),
    "single_line": Check(lambda r, _: float(len(r.lines) == 1), NOTHING, "no line breaks", None, "Owls hunt mice."),
    "all_lowercase": Check(
        lambda r, _: _one_case(r, str.isupper), NOTHING, "no capital letter; graded", None, "owls hunt mice."
    ),
    "all_uppercase": Check(
        lambda r, _: _one_case(r, str.islower), NOTHING, "no small letter; graded", None, "OWLS HUNT MICE."
    ),
    "title_case": Check(
        lambda r, _: _title_case(r),
        NOTHING,
        "first line capitalised but for small words",
        None,
        "The Owl and the Mouse",
    ),
    "starts_with": Check(
        _starts_with, TEXT, "opens with the phrase, quotes and emphasis aside", "Dear owl", "Dear owl, good night."
    ),
    "ends_with": Check(
        _ends_with,
        TEXT,
        "closes with the phrase; after a word, punctuation may follow",
        "good night",
        "Sleep well, good night!",
    ),
    "contains": Check(
        _contains,
        PHRASES,
        "mentions the phrase, or all of a list; graded by share of the list",
        ["owl", "mouse"],
        "The owl saw a mouse.",
    ),
    "avoids": Check(_avoids, PHRASES, "mentions none of the phrases", "cat", "Owls hunt mice."),
    "on_topic": Check(
        _on_topic,
        TEXTS,
        "some word begins with one of these stems: it is about what was asked",
        ["owl", "bird"],
        "Birds of prey hunt at night.",
    ),
    "no_commas": Check(
        lambda r, _: _without(r, ",，、،".__contains__),
        NOTHING,
        "no comma of any script; graded",
        None,
        "Owls hunt mice.",
    ),
    "no_digits": Check(lambda r, _: _without(r, str.isdigit), NOTHING, "no digit; graded", None, "Two owls hunt."),
    "question": Check(lambda r, _: _ends_with(r, "?"), NOTHING, "ends with a question mark", None, "Who hunts mice?"),
    "json_object": Check(
        _json_object,
        TEXTS,
        "one JSON object with these keys, fenced or not; graded by keys",
        ["name"],
        '{"name": "owl"}',
    ),
    "finished": Check(
        lambda r, _: float(r.finished),
        NOTHING,
        "ended by itself rather than cut at the token limit",
        None,
        "Owls hunt mice.",
    ),
}
TABLE = Table("checks", Check, CHECKS)
"""CHECKS, and those of other packages: entry points in the group `selfplay.checks`."""


def validate_checks(specs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what `grade` could not grade. Raises: ConfigError naming the check and what it wants."""
    specs = list(specs)
    if not specs:
        raise ConfigError(
            "the scorer `checks` needs at least one check in a prompt's row (`selfplay checks` lists them); got none. Add them to "
            "the rows, or set another scorer"
        )
    for spec in specs:
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str) or set(spec) - {"name", "value"}:
            raise ConfigError(f'A check is {{"name": ..., "value": ...}} and nothing more; got {spec!r}.')
        name, value = spec["name"], spec.get("value")
        argument = TABLE.get(name).argument
        if not argument.accepts(value):
            raise ConfigError(f"Check '{name}' wants {argument.expected}; got {value!r}.")


# --- grading ---


class Graded(NamedTuple):
    """What a completion is worth."""

    score: float
    passed: tuple[bool, ...]
    """In the order of the checks: whether each has full credit."""


def grade(text: str, specs: Sequence[Mapping[str, Any]], *, finished: bool = True) -> Graded:
    """The mean credit of the (validated) checks, in [0, 1].

    A text without a word passes nothing: silence must not win "no commas". For the same reason a text shorter than
    the prompt asks for (min_words, words_between) keeps only the share of its score that it has of the words: one
    lower-case word is not most of an answer.

    >>> specs = [{"name": "words_between", "value": [4, 8]}, {"name": "all_lowercase"}]
    >>> grade("owls hunt at night.", specs).score, grade("owls", specs).score
    (1.0, 0.15625)
    """
    completion = Completion(text, finished)
    if not completion.words:
        return Graded(0.0, (False,) * len(specs))
    credits = [TABLE.get(spec["name"]).credit(completion, spec.get("value")) for spec in specs]
    enough = min(_at_least(len(completion.words), _fewest_words(spec)) for spec in specs)
    return Graded(enough * sum(credits) / len(credits), tuple(credit == 1.0 for credit in credits))


def _fewest_words(spec: Mapping[str, Any]) -> int:
    if spec["name"] == "min_words":
        return spec["value"]
    return spec["value"][0] if spec["name"] == "words_between" else 1


def repetition(text: str) -> float:
    """The share of a text that is a loop, in [0, 1]: 0 for ordinary prose, near 1 for a stuck sampler.

    The larger of two shares: word 3-grams that occurred before, and words equal to the word before them (a loop
    too short for 3-grams). A single overlong "word" is read by its letters: "aaaa..." is a loop too.

    >>> repetition("yes yes yes yes"), repetition("the owl saw a mouse")
    (1.0, 0.0)
    """
    words = [_fold(re.sub(r"^[\W_]+", "", _without_closing(word))) for word in Completion(text).words]
    units = list(words[0]) if len(words) == 1 and len(words[0]) > 20 else words
    grams = [tuple(units[i : i + 3]) for i in range(len(units) - 2)]
    looped = echoed = 0.0
    if grams:
        looped = 1 - len(set(grams)) / len(grams)
    if len(units) > 1:
        echoed = sum(unit == next_unit for unit, next_unit in pairwise(units)) / (len(units) - 1)
    return max(looped, echoed)
