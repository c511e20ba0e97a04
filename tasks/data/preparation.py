"""Tasks - the prompts of a run: read, fitted to what its pairing reads, held apart from the prompts that measure it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from data_contracts.errors import ConfigError
from data_contracts.near_duplicates import check_disjoint
from data_contracts.words import plural
from tasks.data.drops import Drops
from tasks.data.memory import Memory
from tasks.data.prompt_set import PromptSet
from tasks.data.reading import read_source
from tasks.data.selection import (
    NEARLY_HELD_OUT,
    different_prompts,
    near_heldout,
    paired,
    split_heldout,
    with_answer,
    with_field,
    without,
)
from tasks.data.source import PromptsConfig, Source

Reads = Literal["prompts", "response", "pair", "answers"]
"""What a run reads beside the prompt: nothing; the truth; a pair; single answers that are good or bad, or pairs as two
of them."""


HOW_NEAR = "prompts.duplicate_similarity says how near: 1.0 drops the same text only"
"""What to do about rows that are nearly a held-out prompt."""


class Prepared(NamedTuple):
    """The prompts of a run, and what to say of them."""

    train: PromptSet
    heldout: PromptSet
    rows: int
    """Rows of the training source, unusable ones included."""
    drops: Drops
    """Training rows that are not used."""
    heldout_drops: Drops
    notes: list[str]

    def counts(self) -> dict[str, float]:
        """What the record of an artifact of the training prompts says of their source."""
        dropped = {f"dropped/{reason}": float(count) for reason, count in self.drops.counts.items()}
        return {"source_rows": float(self.rows), "dropped": float(self.drops.counts.total())} | dropped

    def summary(self) -> str:
        """What a terminal says of the prompts: how many, and in the same line how many rows are not used, and why."""
        line = f"{len(self.train)} training prompts of {self.rows} rows, {len(self.heldout)} held-out prompts"
        for drops, what in ((self.drops, "training"), (self.heldout_drops, "held-out")):
            if drops.counts:
                reasons = ", ".join(f"{count} {reason}" for reason, count in drops.counts.most_common())
                line += f"; {plural(drops.counts.total(), f'{what} row')} not used ({reasons})"
        if self.drops.counts[NEARLY_HELD_OUT]:
            line += f"; {HOW_NEAR}"
        if self.drops.counts or self.heldout_drops.counts or self.notes:
            line += "; more in the report"
        return line

    @property
    def drops_over_a_third(self) -> bool:
        """Whether more than a third of the training rows is not used: a person should look."""
        return 3 * self.drops.counts.total() > self.rows

    def lines(self) -> list[str]:
        """What a report says of the prompts, with places and examples of the rows that are not used."""
        lines = [f"{len(self.train)} training prompts of {self.rows} rows, {len(self.heldout)} held-out prompts"]
        for drops, what in ((self.drops, "training"), (self.heldout_drops, "held-out")):
            if drops.counts:
                lines += [f"{what} rows that are not used:", *drops.text().splitlines()]
        return lines + self.notes

    def check(self, config: PromptsConfig) -> None:
        """Raises: ConfigError if more rows were dropped than the settings allow."""
        advice = HOW_NEAR if self.drops.counts[NEARLY_HELD_OUT] else ""
        self.drops.check(str(config.train), self.rows, config.max_drop_rate, advice)
        rows = len(self.heldout) + self.heldout_drops.unusable
        self.heldout_drops.check(f"held-out prompts ({config.heldout})", rows, config.max_drop_rate)


def prepare(config: PromptsConfig, seed: int, reads: Reads) -> Prepared:
    """Read the sources and choose the rows that the run can read. A part of `train` is not held out yet (`hold_out`).

    Raises: ConfigError for sources that cannot be read or do not hold what the run reads.
    """
    source = config.train_source
    reading = read_source(source, seed)
    drops, notes = reading.drops, list(reading.notes)
    train, more_drops = _fitted(reading.prompts, reads, str(source))
    drops.update(more_drops)
    heldout, heldout_drops = train[:0], Drops()
    if config.heldout_source is not None:
        heldout_reading = read_source(config.heldout_source, seed)
        heldout, heldout_drops = different_prompts(heldout_reading.prompts)
        heldout_drops.update(heldout_reading.drops)
        notes += [f"held-out prompts: {note}" for note in heldout_reading.notes]
    return Prepared(train, heldout, reading.rows, drops, heldout_drops, notes)


def hold_out(prepared: Prepared, config: PromptsConfig, seed: int, memory: Memory) -> Prepared:
    """Training prompts that are like no held-out one; a part of them is held out now, if the settings say so.

    Raises: ConfigError where training and held-out prompts overlap and the settings refuse that, and where one of the
    two is empty.
    """
    train, heldout = prepared.train, prepared.heldout
    if isinstance(config.heldout, float):
        train, heldout = split_heldout(train, config.heldout, seed)
    train, more_drops = _apart(train, heldout, config, memory)
    prepared.drops.update(more_drops)
    for prompts, what in ((train, "training"), (heldout, "held-out")):
        if not prompts:
            raise ConfigError(f"{config.train}: no {what} prompt is left\n{prepared.drops.text()}")
    return prepared._replace(train=train, heldout=heldout)


def _fitted(prompts: PromptSet, reads: Reads, origin: str) -> tuple[PromptSet, Drops]:
    """The rows that hold what the run reads. Raises: ConfigError if there are none."""
    if reads == "prompts":
        return different_prompts(prompts)
    if reads == "response":
        fitted, drops = with_field(prompts, "response", "no `response`, which this run trains on")
        missing = "a `response`"
    elif reads == "pair":
        fitted, drops = paired(prompts)
        fitted, more_drops = with_field(fitted, "chosen", "no `chosen` and `rejected`, which this run trains on")
        drops.update(more_drops)
        missing = "a `chosen` and a `rejected` answer"
    else:
        fitted, drops = with_answer(prompts, "no answer, which this run trains on")
        missing = "a `chosen` or `rejected` answer, or a `completion` with its `label`"
    if not fitted:
        raise ConfigError(
            f"the run trains on given texts, and none of the {len(prompts)} prompts of {origin} has {missing}: give "
            "other prompts, say with `columns` which column it is, or choose another scoring.pairing"
        )
    return fitted, drops


def _apart(train: PromptSet, heldout: PromptSet, config: PromptsConfig, memory: Memory) -> tuple[PromptSet, Drops]:
    """Training prompts that are like no held-out one. Raises: ConfigError where the settings refuse such."""
    question = {"train": train.digest, "heldout": heldout.digest, "similarity": config.duplicate_similarity}
    if config.near_duplicates == "refuse" and isinstance(config.heldout, Source):
        memory.recall(
            question | {"check": "disjoint"}, lambda: check_disjoint(train, heldout, config.duplicate_similarity)
        )
        return train, Drops()
    near = memory.recall(
        question | {"check": "near"}, lambda: near_heldout(train, heldout, config.duplicate_similarity)
    )
    return without(train, {int(index): sentence for index, sentence in near.items()}, NEARLY_HELD_OUT)
