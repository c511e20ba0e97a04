"""Stages - what a scorer is. One call per prompt batch; raw scores are kept for ever, preferences are derived from them (pairing.py).

Axes: K candidates of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from stages.registry import Named


class Candidates(NamedTuple):
    """One prompt and its candidates, as rows of the contracts say."""

    prompt: dict[str, Any]
    """A row of `prompts`."""
    generations: list[dict[str, Any]]
    """Rows of `generations`, by candidate number."""
    start_logps: list[float] | None
    """Mean log-prob per token of each candidate under the start model; only if the scorer asked for it."""


class Scores(NamedTuple):
    scores: np.ndarray | None
    """[K] float64, larger is better; NaN: could not be scored, which is never a number."""
    preference_logits: np.ndarray | None
    """[K, K] float64, entry [i, j] > 0: i beats j; diagonal 0. None for a pointwise scorer."""
    reasons: list[str]
    """[K] why a candidate has no score, or what spoilt it; "" for none."""


class Surroundings(NamedTuple):
    """What the stage offers to a scorer that has a method `prepare`."""

    store_root: Path
    batch_tokens: int
    """Padded tokens per forward."""
    log: Callable[[str], None]
    """A line for the stage's log."""
    compared: Callable[[float], None] = lambda count: None
    """Told by a pair scorer about every few comparisons that are done."""
    used: Callable[..., None] = lambda model, tokens_in, tokens_out=0, **counts: None
    """Told about tokens that a model read and wrote; Job.used."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around what others do for us: a judge's server."""


class Scorer(Protocol):
    """Optional beside what is below: `TEXT_ONLY = True` says that prompt and completion texts are all it looks at, so that equal completions
    are scored once; `prepare(surroundings)` is called after the constructor; `metrics() -> {name: number}` is asked after each shard;
    `compares(config) -> bool`: whether it is a pair scorer, so that progress counts comparisons; `close()` is called when nothing more will be
    scored.
    """

    Config: type[Named]

    def __init__(self, config: Any, device: str): ...

    @staticmethod
    def needs_start_logps(config: Any) -> bool:
        """Whether the stage must supply `Candidates.start_logps`."""

    @staticmethod
    def check_prompts(config: Any, prompts: Sequence[dict[str, Any]]) -> None:
        """Raises: ConfigError for prompts it cannot score, before anything is sampled."""

    def score(self, batch: Sequence[Candidates]) -> list[Scores]: ...


def prompt_text(prompt: Mapping[str, Any]) -> str:
    """A prompt as text for scorers that know no chat template: the message itself, or turns marked as llm-blender marks them."""
    messages = prompt["messages"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].upper()}: {message['content']}" for message in messages)


def once_each(
    batch: Sequence[Candidates], key: Callable[[dict[str, Any]], Hashable]
) -> tuple[list[Candidates], list[list[int]]]:
    """The batch without repeated candidates, and for each prompt the number that each candidate has there."""
    small, numbers = [], []
    for item in batch:
        seen: dict[Hashable, int] = {}
        numbers.append([seen.setdefault(key(row), len(seen)) for row in item.generations])
        firsts = [numbers[-1].index(number) for number in range(len(seen))]
        logps = None if item.start_logps is None else [item.start_logps[k] for k in firsts]
        small.append(Candidates(item.prompt, [item.generations[k] for k in firsts], logps))
    return small, numbers


def spread(scores: Scores, numbers: Sequence[int]) -> Scores:
    """The scores of distinct candidates -> of all: equal ones have equal scores, and tie with each other."""
    index = np.asarray(numbers, dtype=int)
    logits = None if scores.preference_logits is None else scores.preference_logits[np.ix_(index, index)]
    return Scores(None if scores.scores is None else scores.scores[index], logits, [scores.reasons[k] for k in numbers])


def score_once(scorer: Any, batch: Sequence[Candidates]) -> tuple[list[Scores], list[int]]:
    """Score a batch; a scorer of texts is asked once about equal ones. Returns: the scores, and how many candidates it saw of each prompt."""
    if not getattr(scorer, "TEXT_ONLY", False):
        return scorer.score(batch), [len(item.generations) for item in batch]
    small, numbers = once_each(batch, lambda row: row["completion"])
    scores = [spread(*item) for item in zip(scorer.score(small), numbers, strict=True)]
    return scores, [len(item.generations) for item in small]


def prepared(scorer_class: Any, config: Any, device: str, surroundings: Surroundings) -> Any:
    """The scorer, with what the stage offers if it wants it."""
    scorer = scorer_class(config, device)
    if hasattr(scorer, "prepare"):
        scorer.prepare(surroundings)
    return scorer


def compares(config: Named) -> bool:
    """Whether the scorer of these settings compares candidates pair by pair."""
    from stages.scoring import SCORERS

    scorer_class = SCORERS.get(config.name)
    return hasattr(scorer_class, "compares") and scorer_class.compares(config)


def close(scorer: Any) -> None:
    """What a scorer holds (a server, say) is given back."""
    if hasattr(scorer, "close"):
        scorer.close()
