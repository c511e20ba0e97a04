"""Stages - what a scorer is: a class with one compulsory method, `score`.

A scorer gives points (one number per candidate) or comparisons (one number per ordered pair). The stage keeps these raw
scores for ever; pairing.py derives preferences from them.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from data_contracts.checkpoint import ModelRef
from data_contracts.prompts import Message, PromptRow
from data_contracts.rows import GenerationRow
from stages.registry import Named, Plugin
from stages.scoring import SCORERS

T = TypeVar("T")


class Candidates(NamedTuple):
    """One prompt and its candidates, as rows of the contracts."""

    prompt: PromptRow
    generations: list[GenerationRow]
    """By candidate number."""
    start_logps: list[float] | None
    """Mean log-prob per token of each candidate under the start model, in nats; None unless the scorer needs it."""

    @classmethod
    def of_texts(cls, prompt: str, completions: Sequence[str]) -> Candidates:
        """A prompt and its candidates from their texts, for scorers that read nothing else. For use outside of a run."""
        row = PromptRow(
            prompt_id="prompt",
            messages=[Message(role="user", content=prompt)],
            checks="[]",
            response=None,
            chosen=None,
            rejected=None,
            source="",
        )
        generations = [
            GenerationRow(
                prompt_id="prompt",
                candidate=number,
                prompt_ids=[],
                token_ids=[],
                token_logps=[],
                finish_reason="stop",
                seed=0,
                completion=text,
            )
            for number, text in enumerate(completions)
        ]
        return cls(row, generations, None)


class Scores(NamedTuple):
    """The raw scores of one prompt's candidates: points or comparisons."""

    scores: np.ndarray | None
    """[K] float64, larger is better; NaN: this candidate could not be scored. None for a scorer that compares pairs."""
    preference_logits: np.ndarray | None
    """[K, K] float64, entry [i, j] > 0: i beats j; diagonal 0. None for a scorer that gives points."""
    reasons: list[str]
    """[K] why a candidate has no score, or what spoilt it; "" if nothing did."""

    @classmethod
    def of_points(cls, points: Sequence[float] | np.ndarray, reasons: Sequence[str] = ()) -> Scores:
        """The scores of K candidates, one number each."""
        return cls(np.asarray(points, dtype=np.float64), None, list(reasons) or [""] * len(points))

    @classmethod
    def of_comparisons(cls, logits: np.ndarray, reasons: Sequence[str] = ()) -> Scores:
        """The logits of K x K comparisons, row by row."""
        return cls(None, logits, list(reasons) or [""] * len(logits))


class Services(NamedTuple):
    """What the stage offers a scorer. The defaults serve a scorer that is used outside of a stage."""

    store_root: Path | None = None
    """Root of the store, where a scorer may keep what can be computed again; None: there is no store."""
    batch_tokens: int | None = None
    """Padded tokens per forward; None: what the scorer thinks right on its device."""
    log: Callable[[str], None] = lambda line: None
    """Write a line to the stage's log."""
    compared: Callable[[float], None] = lambda count: None
    """Report `count` more finished comparisons, for the progress bar."""
    used: Callable[..., None] = lambda model, tokens_in, tokens_out=0, **counts: None
    """Account for the tokens that a model read and wrote: Job.used."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context manager for the time in which somebody else's server works: it does not count as busy."""


class Scorer(Plugin, ABC):
    """A judge of candidates. A subclass writes `Config` and `score`; everything else has a default.

    The stage asks the class (`compares`, `needs_start_logps`, `check_prompts`) before it makes an instance, and makes
    one only if a shard is missing: instance(config, device), `prepare`, then `score` and `metrics` once per shard, then
    `close`.
    """

    TEXT_ONLY: ClassVar[bool] = False
    """True: the scores depend on nothing but the texts of prompt and completion, so equal completions are scored
    once."""

    def __init__(self, config: Any, device: str):
        """`config`: an instance of the subclass's own `Config`; `device`: auto, cpu or cuda."""
        self.config, self.device, self.services = config, device, Services()

    @classmethod
    def compares(cls, config: Any) -> bool:
        """Whether these settings compare candidates pair by pair and give none of them points."""
        return False

    @classmethod
    def needs_start_logps(cls, config: Any) -> bool:
        """Whether the stage must supply `Candidates.start_logps`."""
        return False

    @classmethod
    def check_prompts(cls, config: Any, prompts: Sequence[PromptRow]) -> None:
        """Refuse prompts that cannot be scored, before anything is sampled. Raises: ConfigError."""
        return None

    @classmethod
    def models(cls, config: Any) -> list[tuple[ModelRef, str]]:
        """The models that the scorer loads, each with what it is loaded as (stages/models/architecture.py; "" for a
        network of the scorer's own, which compares tensors while it loads)."""
        return []

    def prepare(self, services: Services) -> None:
        """Take the stage's services; called once, before the first `score`."""
        self.services = services

    @abstractmethod
    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        """The scores of each prompt's candidates, in order. Load models here, at the first call."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the stage's log since the start, by name."""
        return {}

    def close(self) -> None:
        """Give back what the scorer holds (a server, say); called when nothing more will be scored."""
        return None


def scorer_class(config: Named) -> type[Scorer]:
    """The class of the scorer with these settings. Raises: ConfigError for an unknown name."""
    return SCORERS.get(config.name)


def open_scorer(config: Named, device: str, services: Services) -> Scorer:
    """The scorer with these settings, ready to score."""
    scorer = scorer_class(config)(config, device)
    scorer.prepare(services)
    return scorer


def compares(config: Named) -> bool:
    """Whether the scorer with these settings compares candidates pair by pair and gives none of them points."""
    return scorer_class(config).compares(config)


def by_prompt(values: Sequence[T], batch: Sequence[Candidates]) -> list[Sequence[T]]:
    """Cut values, one for each candidate of each prompt in order, into those of each prompt."""
    ends = list(accumulate(len(item.generations) for item in batch))
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def prompt_text(messages: Sequence[Message]) -> str:
    """Return a prompt as text for scorers without a chat template.

    One message as it is, several turns in llm-blender's notation.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role'].upper()}: {message['content']}" for message in messages)


def score_once(scorer: Scorer, batch: Sequence[Candidates]) -> tuple[list[Scores], list[int]]:
    """Return the scores of a batch, and how many candidates of each prompt were scored.

    A scorer that reads only texts gets equal completions once.
    """
    if not scorer.TEXT_ONLY:
        return scorer.score(batch), [len(item.generations) for item in batch]
    distinct = [_distinct(item) for item in batch]
    scores = scorer.score([candidates for candidates, _ in distinct])
    repeated = [_repeat(score, numbers) for score, (_, numbers) in zip(scores, distinct, strict=True)]
    return repeated, [len(candidates.generations) for candidates, _ in distinct]


def _distinct(item: Candidates) -> tuple[Candidates, list[int]]:
    """Return the candidates with distinct completions, and each candidate's index among them [K]."""
    seen: dict[str, int] = {}
    numbers = [seen.setdefault(row["completion"], len(seen)) for row in item.generations]
    firsts = [numbers.index(number) for number in range(len(seen))]
    logps = None if item.start_logps is None else [item.start_logps[k] for k in firsts]
    return Candidates(item.prompt, [item.generations[k] for k in firsts], logps), numbers


def _repeat(scores: Scores, numbers: Sequence[int]) -> Scores:
    """Return the scores of all K candidates from those of the distinct ones: equal completions tie."""
    index = np.asarray(numbers, dtype=int)
    points = None if scores.scores is None else scores.scores[index]
    logits = None if scores.preference_logits is None else scores.preference_logits[np.ix_(index, index)]
    return Scores(points, logits, [scores.reasons[k] for k in numbers])
