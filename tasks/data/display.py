"""Tasks - prompts for people to look at: how many, how long, and rows exactly as the policy will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc

from data_contracts.prompts import PromptRow
from stages.models.turns import Turns
from tasks.data.prompt_set import PromptSet
from tasks.data.selection import paired

ANSWERS = ("response", "chosen", "rejected")
SAMPLED = 2000
"""Rows whose tokens are counted, evenly spaced: counting all of a large set takes minutes."""
BINS = 8
WIDTH = 40
WITHOUT_ANSWER = "without an answer"
SHOWN_PLACES = 5
"""Rows without an answer that are named, where others have one."""
LEGEND = "[...] is a special token, >>>...<<< is what the policy is trained on or scored by; all else is text"


def contents(prompts: PromptSet) -> list[str]:
    """How many rows hold which answers."""
    missing = {name: pc.is_null(prompts.column(name)).to_numpy() for name in ANSWERS}
    has_pair = ~missing["chosen"] & ~missing["rejected"]
    is_single = missing["chosen"] != missing["rejected"]
    counts = {
        "with a response": ~missing["response"],
        "pairs": has_pair,
        "single answers with a label": is_single,
        WITHOUT_ANSWER: missing["response"] & missing["chosen"] & missing["rejected"],
    }
    lines = [f"{int(count.sum())} {name}" for name, count in counts.items() if count.any()]
    if len(lines) > 1 and counts[WITHOUT_ANSWER].any():  # methods on given answers will drop these
        rows = np.flatnonzero(counts[WITHOUT_ANSWER])
        more = f" and {len(rows) - SHOWN_PLACES} more" if len(rows) > SHOWN_PLACES else ""
        lines[-1] += f" ({', '.join(prompts.where(int(row)) for row in rows[:SHOWN_PLACES])}{more})"
    if is_single.any():
        pairs, drops = paired(prompts)
        count = len(pairs) - pairs.column("chosen").null_count
        lines.append(f"for methods of pairs: {count} pairs, and {drops.counts.total()} answers without a partner")
    return lines


def as_seen(row: PromptRow, turns: Turns, max_response_tokens: int) -> Iterator[str]:
    """The lines of a row as its tokens say: the prompt, then each answer."""
    yield _marked(turns, turns.prompt(row["messages"]))
    for name in ANSWERS:
        if (text := row[name]) is not None:
            ids = turns.response(text)
            cut = ", cut" if len(ids) > max_response_tokens else ""
            ids = ids[:max_response_tokens]
            yield f">>>{_marked(turns, ids)}<<<   ({name}: {len(ids)} tokens{cut})"


def _marked(turns: Turns, ids: Sequence[int]) -> str:
    """The text of some tokens, the special ones in brackets: data that spells them cannot be taken for them."""
    pieces: list[str] = []
    plain: list[int] = []
    for number in [*ids, None]:
        if number is not None and number not in turns.control_ids:
            plain.append(number)
            continue
        if plain:
            pieces.append(turns.tokenizer.decode(plain, skip_special_tokens=False))
            plain = []
        if number is not None:
            pieces.append(f"[{turns.tokenizer.convert_ids_to_tokens(number)}]")
    return "".join(pieces)


def lengths(prompts: PromptSet, turns: Turns) -> dict[str, np.ndarray]:
    """Tokens of prompts and answers, of at most SAMPLED rows."""
    counts: dict[str, list[int]] = {"prompt": [], **{name: [] for name in ANSWERS}}
    step = max(1, len(prompts) // SAMPLED)
    for row in prompts[::step]:
        counts["prompt"].append(len(turns.prompt(row["messages"])))
        for name in ANSWERS:
            if (text := row[name]) is not None:
                counts[name].append(len(turns.response(text)))
    return {name: np.asarray(values) for name, values in counts.items() if values}


def histograms(counts: Mapping[str, np.ndarray]) -> Iterator[str]:
    """A line of quantiles for each kind of text, and a bar for each range of its lengths."""
    for name, values in counts.items():
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).astype(int)
        yield f"{name} tokens: median {middle}, 90 % from {low} to {high}, longest {values.max()}"
        edges = np.unique(np.linspace(0, values.max() + 1, BINS + 1).astype(int))
        sizes, _ = np.histogram(values, edges)
        for first, last, size in zip(edges, edges[1:] - 1, sizes, strict=False):
            bar = "#" * round(WIDTH * size / max(sizes))
            yield f"  {first:>6} to {last:<6} {size:>7}  {bar}".rstrip()
