"""Benchmark - the small children's stories that the claims are tried on: openings, endings, and endings gone wrong.

    python -m benchmarks._story_prompts          # writes deploy/prompts/stories_*.jsonl again, byte for byte

Each story is put together from sentences of ours (`PLOTS`): the prompt is its first two sentences, `response` and
`chosen` are the next three. `rejected` is the same ending with two planted slips, each of one word or two: another
thing, another name, another colour, another place, the opposite feeling. So a pair differs in few tokens, and
everything that tells good from bad is in them. Names, things and places of the held-out stories are in none of the
training ones.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

PROMPTS = Path(__file__).resolve().parents[1] / "deploy" / "prompts"
SIZES = {"stories_train": 224, "stories_more": 64, "stories_heldout": 64}
"""File -> stories. stories_more: training stories too, in a file of their own so that their pairs can be swapped."""


class Plot(NamedTuple):
    opening: tuple[str, ...]
    """Sentences of the prompt, two alternatives each, `|` between them."""
    ending: tuple[str, ...]


class Words(NamedTuple):
    names: tuple[tuple[str, str], ...]
    """Name and kind."""
    things: tuple[str, ...]
    places: tuple[str, ...]


TRAINING = Words(
    tuple(
        pair
        for kind, names in {
            "girl": ("Lily", "Mia", "Sue", "Anna", "Amy", "Lucy"),
            "boy": ("Tim", "Tom", "Ben", "Max", "Jack", "Sam"),
            "dog": ("Spot", "Rex", "Buddy"),
            "cat": ("Kitty", "Whiskers", "Mittens"),
        }.items()
        for pair in ((name, kind) for name in names)
    ),
    ("ball", "hat", "car", "doll", "book", "kite", "cup", "boat", "shoe", "drum", "truck", "bell"),
    ("park", "garden", "house", "forest", "yard", "kitchen", "farm", "beach"),
)
HELDOUT = Words(
    tuple(
        pair
        for kind, names in {
            "girl": ("Sara", "Jane", "Emma"),
            "boy": ("Bob", "Fred", "Leo"),
            "dog": ("Fido", "Ruff"),
            "cat": ("Tiger", "Snowy"),
        }.items()
        for pair in ((name, kind) for name in names)
    ),
    ("bear", "train", "flag", "spoon", "block", "scarf", "horn", "box"),
    ("lake", "shop", "school", "field", "barn"),
)
COLOURS = ("red", "blue", "green", "yellow", "big", "little", "shiny", "soft")
HELPERS = ("mom", "dad", "friend", "sister", "brother")
OPPOSITES = {"happy": "sad", "glad": "angry", "smiled": "cried", "hugged": "hit", "thanked": "forgot", "kind": "mean"}
PLOTS = (
    Plot(
        (
            "One day, a little {kind} named {name} lost a {colour} {thing}.|"
            "Once there was a {kind} named {name} who could not find the {colour} {thing}.",
            "{name} was very sad and went to the {place}.|{He} wanted to look for it in the {place}.",
        ),
        (
            "{name} looked and looked for the {thing}.|{He} asked {his} {helper} to help find the {thing}.",
            "Then {his} {helper} found the {colour} {thing} in the {place}.|"
            "At last {he} saw the {colour} {thing} behind a tree.",
            "{name} was happy and hugged {his} {helper}.|{name} smiled and was happy to have the {thing} again.",
        ),
    ),
    Plot(
        (
            "Once upon a time, there was a {kind} named {name} who had a {colour} {thing}.|"
            "{name} was a {kind} who loved a {colour} {thing}.",
            "One day, {his} {helper} wanted to play with it in the {place}.|"
            "{name} took it to the {place} and met {his} {helper} there.",
        ),
        (
            '{name} did not want to share the {thing} at first.|{name} said, "No, the {thing} is mine."',
            "But {his} {helper} looked sad, so {name} shared the {colour} {thing}.|"
            "Then {he} was kind and gave the {colour} {thing} to {his} {helper}.",
            "They played in the {place} and {name} was happy.|{His} {helper} smiled and thanked {name}.",
        ),
    ),
    Plot(
        (
            "It was a sunny day and {name} the {kind} went to the {place}.|"
            "One morning, {name} the {kind} went for a walk to the {place}.",
            "{He} saw a {colour} {thing} on the ground.|There was a {colour} {thing} under a bench.",
        ),
        (
            "{name} picked up the {thing} and took it to {his} {helper}.|"
            "{He} wanted to know who lost the {colour} {thing}.",
            '{His} {helper} said, "That is my {thing}, I lost it in the {place}."|'
            '{His} {helper} came to the {place} and said, "You found my {thing}!"',
            "{name} gave it back and {his} {helper} smiled.|{His} {helper} thanked {name}, and {he} was glad.",
        ),
    ),
    Plot(
        (
            "{name} was a little {kind} who wanted to make a gift for {his} {helper}.|"
            "It was the birthday of {his} {helper}, and {name} the {kind} wanted to make a gift.",
            "{He} went to the {place} to get some {colour} paint.|{He} sat down in the {place} with {colour} paper.",
        ),
        (
            "{name} made a {colour} {thing} all day.|{He} worked hard and made a {colour} {thing}.",
            "Then {name} gave the {thing} to {his} {helper}.|{His} {helper} opened the gift and saw the {thing}.",
            '{His} {helper} hugged {name} and was very happy.|{His} {helper} smiled and said, "I love the {thing}!"',
        ),
    ),
    Plot(
        (
            "{name} the {kind} heard a loud noise in the {place}.|One night, {name} the {kind} heard a noise from the {place}.",
            "{He} was scared and called {his} {helper}.|{He} took {his} {helper} along to see what it was.",
        ),
        (
            "They went to the {place} and looked around.|{name} and {his} {helper} looked behind the door.",
            "It was only a {colour} {thing} that fell on the floor.|They saw a {colour} {thing} rolling on the floor.",
            "{name} was not scared any more and smiled.|{name} picked up the {thing} and was glad.",
        ),
    ),
    Plot(
        (
            "{name} the {kind} broke the {colour} {thing} of {his} {helper}.|"
            "One day, {name} the {kind} was playing in the {place} and broke a {colour} {thing}.",
            "{He} ran to the {place} to hide.|{He} was afraid to tell {his} {helper} about it.",
        ),
        (
            "But {name} knew that {he} had to tell {his} {helper}.|"
            '{name} went to {his} {helper} and said, "I am sorry, I broke the {thing}."',
            "{His} {helper} was kind and they fixed the {thing}.|"
            "Together they fixed the {colour} {thing} with some glue.",
            "{name} was happy and hugged {his} {helper}.|Now the {thing} was like new and {name} was glad.",
        ),
    ),
)


def story(words: Words, generator: random.Random) -> dict[str, object]:
    """One story as a row of prompts, without its id."""
    plot = generator.choice(PLOTS)
    name, kind = generator.choice(words.names)
    he, his = ("she", "her") if kind == "girl" else ("he", "his")
    values = {
        "name": name,
        "kind": kind,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "His": his.capitalize(),
        "thing": generator.choice(words.things),
        "place": generator.choice(words.places),
        "colour": generator.choice(COLOURS),
        "helper": generator.choice(HELPERS),
    }
    opening = [generator.choice(sentence.split("|")) for sentence in plot.opening]
    ending = [generator.choice(sentence.split("|")) for sentence in plot.ending]
    prompt = " ".join(opening).format(**values)
    chosen = " " + " ".join(ending).format(**values)
    return {
        "prompt": prompt,
        "checks": [
            *(
                {"name": "contains", "value": word}
                for word in (name, values["thing"], values["helper"])
                if word in prompt
            ),
            {"name": "sentences", "value": 3},
            {"name": "words_between", "value": [18, 36]},
        ],
        "response": chosen,
        "chosen": chosen,
        "rejected": slipped(chosen, values, words, generator),
    }


def slipped(ending: str, values: dict[str, str], words: Words, generator: random.Random) -> str:
    """The ending with two slips."""
    others = {
        values["thing"]: words.things,
        values["name"]: tuple(name for name, _ in words.names),
        values["colour"]: COLOURS,
        values["place"]: words.places,
        values["helper"]: HELPERS,
    }
    replacements = {
        word: generator.choice([other for other in all_of if other != word]) for word, all_of in others.items()
    }
    present = [word for word in [*replacements, *OPPOSITES] if f" {word}" in ending]
    for word in generator.sample(present, 2):
        ending = ending.replace(f" {word}", f" {replacements.get(word) or OPPOSITES[word]}", 1)
    return ending


def rows(name: str) -> list[dict[str, object]]:
    """The rows of a file of SIZES; the same ones every time."""
    generator = random.Random("stories_train stories_more" if name != "stories_heldout" else name)
    words = HELDOUT if name == "stories_heldout" else TRAINING
    first = SIZES["stories_train"] if name == "stories_more" else 0
    prompts: dict[str, dict[str, object]] = {}
    while len(prompts) < first + SIZES[name]:
        row = story(words, generator)
        prompts.setdefault(str(row["prompt"]), row)
    return [
        {"prompt_id": f"{name.removeprefix('stories_')}-{number:03d}"} | row
        for number, row in enumerate(list(prompts.values())[first:])
    ]


def main() -> None:
    """Write the files."""
    for name in SIZES:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(name)]
        (PROMPTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
