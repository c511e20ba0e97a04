"""Stages - one prompt, its candidates and their scores -> rows of `scored_pairs`, or the reason why there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from data_contracts.errors import ConfigError
from data_contracts.prompts import PromptRow, name_of
from data_contracts.rows import GenerationRow, ScoredPairRow
from stages.job import Job
from stages.models.turns import DROPPED, Turns, unusable
from stages.scoring.base import Scores
from stages.scoring.pairing import PAIRINGS, Choice, Group, Rules, TextField, group_of

if TYPE_CHECKING:
    from stages.scoring.stage import ScoringConfig


class Response(NamedTuple):
    """One side of a row."""

    ids: list[int]
    text: str
    score: float | None = None
    win_rate: float = 0.5
    candidate: int = -1
    """Its number; -1: a given text, or none."""


NO_ROOM = "the prompt leaves nothing of scoring.max_total_tokens"
"""Why a prompt is dropped."""
NOTHING = Response([], "", win_rate=0.0)
"""The rejected side of a row of a single response."""


class GivenTexts:
    """A prompt's own texts as tokens of the policy, cut to the limit; the terminator follows unless a text was cut."""

    def __init__(self, job: Job):
        if "policy" not in job.inputs:
            raise ConfigError(f"pairing {job.config.pairing} tokenises given responses: give the input `policy`")
        self.turns, self.config = Turns(job.path("policy"), job.config), job.config

    def unusable(self, prompt: PromptRow) -> str | None:
        """Why the row is dropped; None if it is used."""
        return unusable(prompt, self.config, self.turns)

    def prompt(self, prompt: PromptRow) -> list[int]:
        """The prompt's ids, for rows without generations. Raises: ConfigError if the template refuses its messages."""
        try:
            return self.turns.prompt(prompt["messages"])
        except ConfigError as error:
            raise ConfigError(f"the prompt {name_of(prompt)}: {error}") from None

    def response(self, prompt: PromptRow, field: TextField) -> Response:
        """The text in this field. Raises: ConfigError if the prompt has none."""
        text = prompt[field]
        if text is None:
            raise ConfigError(
                f"pairing {self.config.pairing} needs `{field}` in every prompt; {name_of(prompt)} has none"
            )
        ids = self.turns.response(text)[: self.config.max_response_tokens]
        return Response(ids, text)


class RowMaker:
    """Makes the rows of prompts by the settings of one score stage."""

    def __init__(self, config: ScoringConfig, texts: GivenTexts | None):
        """`texts`: for pairings that use the prompts' own texts."""
        self.config, self.texts = config, texts
        self.name = config.pairing or "best_vs_worst"
        self.pairing = PAIRINGS.get(self.name)

    def rows(self, prompt: PromptRow, candidates: list[GenerationRow], scores: Scores) -> list[ScoredPairRow] | str:
        """The rows of one prompt, or the reason why it gives none."""
        config, group = self.config, None
        if self.texts is not None and (reason := self.texts.unusable(prompt)):
            return reason
        if self.pairing.candidates and not candidates:
            return DROPPED
        if scores.scores is not None or scores.preference_logits is not None:
            group = group_of(scores, config.tau, config.preference)
        lengths = tuple(len(row["token_ids"]) for row in candidates)
        rules = Rules(lengths, prompt["prompt_id"], config.seed, config.max_length_ratio, config.min_preference)
        choices = self.pairing.choose(group or Group.unscored(len(candidates)), rules)
        if isinstance(choices, str):
            return choices
        if self.pairing.is_single and len(self.pairing.texts) > 1:  # a prompt may have one of the two
            choices = [choice for choice in choices if prompt[str(choice.chosen)] is not None]
            if not choices:
                return "no given answer"
        prompt_ids = candidates[0]["prompt_ids"] if candidates else self._given_texts().prompt(prompt)
        room = None
        if config.max_total_tokens is not None:
            room = config.max_total_tokens - len(prompt_ids)
            if room < 1:
                return NO_ROOM
        rows: list[ScoredPairRow] = []
        for number, choice in enumerate(choices):
            chosen = self._response(choice.chosen, prompt, candidates, group)
            rejected = NOTHING
            if choice.rejected is not None:
                rejected = self._response(choice.rejected, prompt, candidates, group)
            if _has_text(choice):  # a given text is right by definition, unless it was given as the bad one
                is_bad = choice.chosen == "rejected"
                chosen, rejected = chosen._replace(win_rate=0.0 if is_bad else 1.0), rejected._replace(win_rate=0.0)
            rows.append(
                {
                    "pair_id": f"{prompt['prompt_id']}/{self._label(choice, number)}",
                    "prompt_id": prompt["prompt_id"],
                    "prompt_ids": prompt_ids,
                    "chosen_ids": chosen.ids[:room],
                    "rejected_ids": rejected.ids[:room],
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "score_chosen": chosen.score,
                    "score_rejected": rejected.score,
                    "win_rate_chosen": chosen.win_rate,
                    "win_rate_rejected": rejected.win_rate,
                    "chosen_candidate": chosen.candidate,
                    "rejected_candidate": rejected.candidate,
                    "group_scores": None if group is None else group.rewards.tolist(),
                    "group_win_rates": None if group is None else group.win_rates.tolist(),
                    "scorer": config.scorer.name if config.scorer else "",
                }
            )
        return rows

    def _given_texts(self) -> GivenTexts:
        if self.texts is None:
            raise ConfigError(f"pairing {self.name} uses texts of the prompts: its `Pairing` must name them in `texts`")
        return self.texts

    def _label(self, choice: Choice, number: int) -> str:
        """What tells the rows of one prompt apart: the candidates' numbers, or the pairing's name."""
        if _has_text(choice):
            if number:
                return f"{self.name}-{number}"
            return self.name
        if choice.rejected is None:
            return str(choice.chosen)
        return f"{choice.chosen}-{choice.rejected}"

    def _response(
        self, response: int | TextField, prompt: PromptRow, candidates: list[GenerationRow], group: Group | None
    ) -> Response:
        """One side of a row: a candidate or a given text."""
        if isinstance(response, str):
            return self._given_texts().response(prompt, response)
        row = candidates[response]
        side = Response(row["token_ids"], row["completion"], candidate=response)
        if group is None:
            return side
        return side._replace(score=float(group.rewards[response]), win_rate=float(group.win_rates[response]))


def _has_text(choice: Choice) -> bool:
    return any(isinstance(response, str) for response in choice)
