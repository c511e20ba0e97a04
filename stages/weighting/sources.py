"""Stages - the models' passes over the responses of scored pairs, by role, and the rows and weights made of them.

Every model makes its whole pass before the next one is loaded, and leaves it in the log-prob store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from data_contracts.errors import ConfigError
from data_contracts.rows import ScoredPairRow, WeightedPairRow
from stages.job import Job
from stages.models.logps import Pass, Score
from stages.models.policy import QUANTISED
from stages.registry import Named
from stages.stage import EARLIER
from stages.weighting.rows import TeacherIds, TokenNumbers, mixture, responses_of, swapped, weighted_pair
from stages.weighting.teacher import SystemPrompts, TeacherView
from stages.weighting.weights.base import ResponseBatch, Stat, Tokens, WeightProvider

if TYPE_CHECKING:
    from stages.weighting.stage import WeightingConfig

Pairs = Sequence[ScoredPairRow]
Texts = tuple[list[list[int]], list[list[int]]]
"""Token ids of prompts, and of the responses to them."""

POLICIES = ("reference", "policy", *EARLIER)
"""Inputs that are the policy at some time."""
ROLES = ("positive", "negative", "reward_model")
"""Models of the student's tokenizer that a weight provider may compare."""


class Source(NamedTuple):
    """One model's pass, and what the model reads."""

    model_pass: Pass
    texts: Callable[[Pairs], Texts]


class Sources:
    """Everything that goes into the rows of weighted pairs."""

    def __init__(self, job: Job, needs: frozenset[str]):
        """needs: of the weight provider. Raises: ConfigError for a model that is not given, or of another tokenizer."""
        self.job, self.needs = job, needs
        self.config: WeightingConfig = job.config
        self.sources: dict[str, Source] = {}
        self.teacher: TeacherView | None = None
        self._system_prompts: SystemPrompts | None = None
        policy = "policy" if "policy" in job.inputs else "reference"
        if self.config.reference:
            self._add("reference_logps", "reference")
        if self.config.old_policy:
            self._add("old_logps", "policy")
            for model in EARLIER[: max(len(self.config.history), 1) - 1]:
                if model in job.inputs:  # there are fewer in a run's first iterations
                    self._add(model, model)
        if "reference" in needs:
            # The weights compare with the policy as the iteration finds it; the loss may have the start model as its
            # reference.
            self._add("reference", policy)
        for role in ROLES:
            if role in needs:
                self._add(role, role)
        if needs & {"importance", "importance_max_logit"}:
            from stages.weighting.importance import score_importance, score_max_logit_importance

            scores = {"importance": score_importance, "importance_max_logit": score_max_logit_importance}
            for role, score in scores.items():
                if role in needs:
                    self._add(role, policy, kind=role.replace("_", "-"), score=score)
        is_scored = bool(needs & {"teacher", "teacher_unshifted"})
        if is_scored or self.config.teacher_tokens:
            self.teacher = TeacherView(job, is_scored, unshifted="teacher_unshifted" in needs)
        if self.teacher is not None and is_scored:
            self.sources["teacher"] = Source(self.teacher.scores, partial(_teacher_texts, self.teacher))

    def _add(self, role: str, model: str, kind: str = "logps", score: Score | None = None) -> None:
        """Add the pass of the model that is the stage's input `model`."""
        if model not in self.job.inputs:
            raise ConfigError(
                f"the weights need the model `{model}`: give it as an input of weigh, or as `{model}` of the run"
            )
        check_same_tokenizer(self.job, model)
        runtime = self.config.runtime
        options = {} if score is None else {"score": score}
        model_pass = Pass(
            self.job.store_root,
            self.job.inputs[model],
            QUANTISED + self.config.dtype if self.config.quantised and model in POLICIES else self.config.dtype,
            runtime.device,
            runtime.batch_tokens,
            kind,
            packing=runtime.packing,
            **options,
        )
        system = {"positive": self.config.positive_system, "negative": self.config.negative_system}.get(role)
        texts = student_texts if system is None else partial(self._texts_under, system)
        self.sources[role] = Source(model_pass, texts)

    def _texts_under(self, system: str, pairs: Pairs) -> Texts:
        """Prompts with the system prompt `system`, and the responses."""
        if self._system_prompts is None:
            self._system_prompts = SystemPrompts(self.job)
        responses = responses_of(pairs)
        prompts = self._system_prompts.encode([response.pair["prompt_id"] for response in responses], system)
        return prompts, [response.ids for response in responses]

    def sided(self, rows: Sequence[Any]) -> list[ScoredPairRow]:
        """The rows as pairs, with their responses exchanged where the settings say so."""
        pairs = cast("Sequence[ScoredPairRow]", rows)
        if self.config.swap:
            return [swapped(pair) for pair in pairs]
        return list(pairs)

    def fill(self, rows: Sequence[Any], size: int) -> None:
        """Make every model's pass over the rows, `size` of them at a time, with one model in memory at a time."""
        starts = range(0, len(rows), size)
        total = len(starts) * len(self.sources)
        num_done = 0
        for role, source in self.sources.items():
            texts = partial(self._texts_at, source, rows, size)
            for number, start in self.job.share(role, starts, partial(_is_filled, source, texts)):
                if source.model_pass.fill(*texts(start)):
                    self.job.event("pass", role=role, index=number)
                source.model_pass.account(self.job)
                num_done += 1
                self.job.progress(num_done, total, "passes")
            source.model_pass.release()

    def _texts_at(self, source: Source, rows: Sequence[Any], size: int, start: int) -> Texts:
        """What the source's model reads of `size` rows from `start` on."""
        return source.texts(self.sided(rows[start : start + size]))

    def logps(self, role: str, pairs: Pairs) -> list[np.ndarray]:
        """The role's log-probs of each response, in the order of `responses_of`."""
        source = self.sources[role]
        return source.model_pass.get(*source.texts(pairs))

    def weights(
        self, pairs: Pairs, provider: type[WeightProvider], settings: Named
    ) -> tuple[list[np.ndarray], dict[str, Stat]]:
        """One array per response, in the order of `responses_of`, and the provider's statistics."""
        responses = responses_of(pairs)
        view: dict[str, Any] = {}
        if self.teacher is not None:
            view = self.teacher.batch(_as_rows(pairs))
        has_ended = view.pop("ended", [False] * len(responses))
        student = view.pop("student", None)
        if student is None:
            student = Tokens.of([response.ids for response in responses], None, has_ended)
        columns = {role: self.logps(role, pairs) for role in self.sources if role in self.needs and role != "teacher"}
        batch = ResponseBatch(
            keys=[f"{response.pair['pair_id']}/{response.side}" for response in responses],
            chosen=np.array([response.side == "chosen" for response in responses]),
            student=student,
            logps={role: np.concatenate([np.zeros(0, dtype=np.float32), *rows]) for role, rows in columns.items()},
            **view,
        )
        result = provider.weights(settings, batch)
        return result.per_response(batch.student), result.stats

    def rows(self, pairs: Pairs, weights: Sequence[np.ndarray]) -> list[WeightedPairRow]:
        """Rows of weighted_pairs; `weights` has one array per response, in the order of `responses_of`."""
        responses = responses_of(pairs)
        has_reference, has_old_policy = "reference_logps" in self.sources, "old_logps" in self.sources
        reference_logps = self.logps("reference_logps", pairs) if has_reference else [None] * len(responses)
        old_logps = self._opponent_logps(pairs) if has_old_policy else [None] * len(responses)
        columns = zip(responses, weights, reference_logps, old_logps, strict=True)
        numbers = {
            (response.number, response.side): TokenNumbers(token_weights, reference, old)
            for response, token_weights, reference, old in columns
        }
        absent = TokenNumbers.of_no_tokens(has_reference, has_old_policy)
        teacher: list[TeacherIds | None] = [None] * len(pairs)
        if self.teacher is not None and self.config.teacher_tokens:
            teacher = [TeacherIds(*ids) for ids in self.teacher.chosen(_as_rows(pairs))]
        return [
            weighted_pair(
                pair,
                numbers.get((number, "chosen"), absent),
                numbers.get((number, "rejected"), absent),
                teacher[number],
            )
            for number, pair in enumerate(pairs)
        ]

    def _opponent_logps(self, pairs: Pairs) -> list[np.ndarray]:
        """Log-probs of each response under the policy that sampled it, or the mixture of the last policies."""
        newest = self.logps("old_logps", pairs)
        earlier = [self.logps(model, pairs) for model in EARLIER if model in self.sources]
        if not earlier:
            return newest
        return [mixture(logps, self.config.history) for logps in zip(newest, *earlier, strict=True)]

    def cache_counts(self) -> dict[str, float]:
        """Rows of each pass that were stored already, and rows that were computed; by name for the record."""
        counts: dict[str, float] = {}
        for role, source in self.sources.items():
            counts[f"logps/{role}/hits"] = source.model_pass.hits
            counts[f"logps/{role}/misses"] = source.model_pass.misses
        return counts


def student_texts(pairs: Pairs) -> Texts:
    """Prompts and responses as the student reads them."""
    responses = responses_of(pairs)
    return [response.pair["prompt_ids"] for response in responses], [response.ids for response in responses]


def _teacher_texts(teacher: TeacherView, pairs: Pairs) -> Texts:
    """Prompts and responses as the teacher reads them."""
    return teacher.responses(_as_rows(pairs))


def _as_rows(pairs: Pairs) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", pairs)


def _is_filled(source: Source, texts: Callable[[int], Texts], start: int) -> bool:
    """Whether the source's pass over the rows from `start` on is stored."""
    return source.model_pass.has(*texts(start))


def check_same_tokenizer(job: Job, model: str) -> None:
    """Token-level comparison needs equal tokens. Raises: ConfigError if the input `model` has another tokenizer."""
    from stages.models.tokens import tokenizer_digest

    base = "reference" if "reference" in job.inputs else "policy"
    if base in job.inputs and tokenizer_digest(job.path(model)) != tokenizer_digest(job.path(base)):
        raise ConfigError(
            f"the model `{model}` ({job.path(model)}) has another tokenizer than `{base}` ({job.path(base)}): its "
            "log-probs are of other tokens. Only the teacher of SWIFT may have one of its own"
        )
