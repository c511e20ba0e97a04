"""Stages - one prompt, its candidates and their scores -> rows of `scored_pairs`, or the reason why there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_contracts.errors import ConfigError
from stages.job import Job
from stages.models.tokens import encode_prompt, encode_response, load_tokenizer
from stages.scoring.base import Scores
from stages.scoring.pairing import PAIRINGS, Choice, Group, Rules, group_of

if TYPE_CHECKING:
    from stages.scoring.stage import ScoringConfig


class GivenTexts:
    """A prompt's own texts as tokens of the policy: tokenised apart from the prompt, with an EOS unless they had to be cut."""

    def __init__(self, job: Job):
        if "policy" not in job.inputs:
            raise ConfigError(f"pairing {job.config.pairing} tokenises given responses: give the input `policy`")
        self.tokenizer, self.config = load_tokenizer(job.path("policy")), job.config

    def prompt(self, prompt: dict[str, Any]) -> list[int]:
        """The prompt's ids, for rows without generations."""
        return encode_prompt(self.tokenizer, prompt["messages"], self.config.template)

    def response(self, prompt: dict[str, Any], field: str) -> list[int]:
        """The ids of the text in this field. Raises: ConfigError if the prompt has none."""
        if prompt[field] is None:
            raise ConfigError(
                f"pairing {self.config.pairing} needs `{field}` in every prompt; {prompt['prompt_id']!r} has none"
            )
        return encode_response(self.tokenizer, prompt[field])[: self.config.max_response_tokens]


class RowMaker:
    """Rows of prompts by the settings of one score stage."""

    def __init__(self, config: ScoringConfig, texts: GivenTexts | None):
        """`texts`: given for pairings that use the prompts' own texts."""
        self.config, self.texts = config, texts
        self.name = config.pairing or "best_vs_worst"
        self.pairing = PAIRINGS.get(self.name)

    def rows(
        self, prompt: dict[str, Any], candidates: list[dict[str, Any]], scores: Scores
    ) -> list[dict[str, Any]] | str:
        """The rows of one prompt, or the reason why it gives none."""
        config, group = self.config, None
        if scores.scores is not None or scores.preference_logits is not None:
            group = group_of(scores, config.tau, config.preference)
        lengths = tuple(len(row["token_ids"]) for row in candidates)
        rules = Rules(lengths, prompt["prompt_id"], config.seed, config.max_length_ratio, config.min_preference)
        choices = self.pairing.choose(group or Group.unscored(len(candidates)), rules)
        if isinstance(choices, str):
            return choices
        common = {
            "prompt_id": prompt["prompt_id"],
            "prompt_ids": candidates[0]["prompt_ids"] if candidates else self._texts.prompt(prompt),
            "scorer": config.scorer.name if config.scorer else "",
            "group_scores": None if group is None else group.rewards.tolist(),
            "group_win_rates": None if group is None else group.win_rates.tolist(),
        }
        rows = []
        for number, choice in enumerate(choices):
            row = common | {"pair_id": f"{prompt['prompt_id']}/{self._label(choice, number)}"}
            for side, response in zip(("chosen", "rejected"), choice, strict=True):
                row |= self._response(side, response, prompt, candidates, group)
            if _has_text(choice):  # a given text is right by definition
                row |= {"win_rate_chosen": 1.0, "win_rate_rejected": 0.0}
            rows.append(row)
        return rows

    @property
    def _texts(self) -> GivenTexts:
        if self.texts is None:
            raise ConfigError(f"pairing {self.name} uses texts of the prompts: its `Pairing` must name them in `texts`")
        return self.texts

    def _label(self, choice: Choice, number: int) -> str:
        """What tells the rows of one prompt apart: the candidates' numbers, or the pairing's name."""
        if _has_text(choice):
            return f"{self.name}-{number}" if number else self.name
        return str(choice.chosen) if choice.rejected is None else f"{choice.chosen}-{choice.rejected}"

    def _response(
        self, side: str, response: int | str | None, prompt: dict[str, Any], candidates: list[dict[str, Any]], group: Group | None
    ) -> dict[str, Any]:  # fmt: skip
        """The columns of one side."""
        ids, text, score, win_rate, number = [], "", None, 0.0, -1
        if isinstance(response, str):
            ids, text = self._texts.response(prompt, response), prompt[response]
        elif response is not None:
            ids, text, number = candidates[response]["token_ids"], candidates[response]["completion"], response
            score, win_rate = None, 0.5
            if group is not None:
                score, win_rate = float(group.rewards[response]), float(group.win_rates[response])
        return {
            f"{side}_ids": ids,
            side: text,
            f"score_{side}": score,
            f"win_rate_{side}": win_rate,
            f"{side}_candidate": number,
        }


def _has_text(choice: Choice) -> bool:
    return any(isinstance(response, str) for response in choice)
