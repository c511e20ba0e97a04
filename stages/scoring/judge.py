r"""Stages - the `llm_judge` scorer: a language model behind an OpenAI-compatible endpoint judges candidates.

    rubric     additive: a point for each of five properties, `Score: x`, the mean of `samples`
               (Yuan et al. 2024, arXiv:2401.10020)
    pairwise   which of two is better, both orders; L_ij = +v, -v or 0 for [[A]], [[B]], [[C]] with i shown as A
    logprob    the same question answered by one token; L_ij = log p(A) - log p(B) (as AlpacaEval 2 weighs its verdicts)

A reply that cannot be read, or is out of range, gives no number: the candidate (or the comparison) is unscored, with
the reason. A judge that does not answer ends the stage (endpoint.py). The wording of the prompts is ours.

Axes: K candidates of one prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from data_contracts.checkpoint import ModelRef
from data_contracts.identity import canonical_json, digest_text
from data_contracts.prompts import PromptRow
from stages.models.policy import pick_device
from stages.registry import Named
from stages.scoring.base import Candidates, Scorer, Scores, Services, prompt_text
from stages.scoring.endpoint import Endpoint, EndpointRuntime, Reply
from stages.scoring.models import NamedModel, local_directory, locate
from stages.scoring.served import Served, ServerRuntime
from stages.scoring.verdicts import bare_token, is_contradiction, last_score, only_verdict

RUBRIC = """You are grading one answer to a user's request. Start at 0 and add one point for each statement \
that is true of it:

1. It is about the request and gives at least something of what was asked for.
2. It deals with the greater part of the request, even if something is missing or beside the point.
3. It covers everything essential of the request in a way that the user can put to use.
4. It is written for this user: clear, in good order, complete, in a helpful tone, with little to improve.
5. It could not be better: correct in every detail, no word too many, and with real knowledge of the subject.

A statement can only earn its point if those before it did. Do not reward length.

<request>
{prompt}
</request>

<answer>
{response}
</answer>

Say in at most 80 words what decides your grade. Then end with one line of exactly this form, with a number from 0 to 5:
Score: <points>"""

PAIRWISE = """Two answers to the same request follow. Decide which one serves the user better: correct first, \
then helpful, complete and clear.
Neither the order nor the length of the answers may count.

<request>
{prompt}
</request>

<answer_a>
{first}
</answer_a>

<answer_b>
{second}
</answer_b>

"""
VERDICT = (
    "Say in at most 80 words what decides it. Then end with [[A]] if answer A is better, [[B]] if answer B is, "
    "[[C]] if they are equal."
)
LETTER = "Reply with one letter only, A or B, and nothing else: the better answer is"

SIGNS = {"A": 1.0, "B": -1.0, "C": 0.0}
"""Verdict -> sign of the logit."""

Judgement = float | str
"""What a reply says: a number, or the reason why there is none."""


class LLMJudge(Scorer):
    TEXT_ONLY = True
    VERSION = "2"

    class Config(Named):
        """One greedy judgement by the additive rubric."""

        NEUTRAL: ClassVar[dict[str, Any]] = {"serve": None}

        name: Literal["llm_judge"] = "llm_judge"
        model: str
        """The judge's name at the endpoint. A score depends on it, on `mode` and on the prompts; it does not depend on
        the address."""
        mode: Literal["rubric", "pairwise", "logprob"] = "rubric"
        samples: int = Field(1, ge=1, le=64)
        """Judgements per candidate or comparison; the readable ones are averaged. More than 1 needs a temperature."""
        temperature: float = Field(0.0, ge=0)
        max_tokens: int = Field(512, ge=1)
        """Of a reply; `logprob` takes 1."""
        verdict_logit: float = Field(math.log(9), gt=0)
        """v, pairwise: a verdict that holds in both orders is a preference of sigmoid(v); log 9 is 0.9."""
        prompt: str | None = None
        """Another wording: with {prompt} and {response} for `rubric`, with {prompt}, {first} and {second} otherwise."""
        extra: dict[str, Any] = Field(default_factory=dict)
        """More fields of the request, e.g. {chat_template_kwargs: {enable_thinking: false}}."""
        serve: NamedModel | None = None
        """The judge's own weights: the stage runs `vllm serve` of them while it needs the judge, and base_url is not
        asked. `model` is then only a label. None: an endpoint that is already there."""
        server: ServerRuntime = ServerRuntime()
        """How `serve` is served."""
        runtime: EndpointRuntime = EndpointRuntime()

        @model_validator(mode="after")
        def _samples_differ(self) -> LLMJudge.Config:
            if self.samples > 1 and self.temperature == 0:
                raise ValueError(
                    f"samples is {self.samples} and temperature 0: every judgement would be the same; "
                    "set a temperature, or samples to 1"
                )
            return self

        @field_validator("prompt")
        @classmethod
        def _has_placeholders(cls, value: str | None, info: ValidationInfo) -> str | None:
            needed = ("{prompt}", "{first}", "{second}")
            if info.data.get("mode") == "rubric":
                needed = ("{prompt}", "{response}")
            if value is not None and (missing := [name for name in needed if name not in value]):
                raise ValueError(f"the judge's prompt has no place for {' and '.join(missing)}")
            return value

    def __init__(self, config: Config, device: str):
        super().__init__(config, device)
        self.reasons: Counter[str] = Counter()
        self.name = config.model
        if config.serve is not None:
            # Judgements are cached by the judge's name: a name for weights of one's own must say which weights.
            self.name += f"@{digest_text(canonical_json(config.serve.identity()))[:12]}"
        self.endpoint = Endpoint(config.runtime, None, self._server())

    @classmethod
    def compares(cls, config: Config) -> bool:
        return config.mode != "rubric"

    @classmethod
    def check_prompts(cls, config: Config, prompts: Sequence[PromptRow]) -> None:
        if config.serve is not None:
            local_directory(config.serve, config.name)

    @classmethod
    def models(cls, config: Config) -> list[tuple[ModelRef, str]]:
        return [] if config.serve is None else [(config.serve, "served")]

    def prepare(self, services: Services) -> None:
        super().prepare(services)
        self.endpoint = Endpoint(self.config.runtime, services.store_root, self._server())

    def _server(self) -> Served | None:
        config = self.config
        if config.serve is None:
            return None
        return Served(config.server, locate(config.serve, config.name), self.name, pick_device(self.device))

    def close(self) -> None:
        if self.endpoint.server is not None:
            self.endpoint.server.close()

    def metrics(self) -> dict[str, float]:
        """Counts since the start: requests asked, found in the cache and failed; unusable replies, by reason."""
        counts = {f"judge/{name}": float(self.endpoint.counts[name]) for name in ("asked", "cached", "failed")}
        return counts | {f"judge/{reason}": float(count) for reason, count in self.reasons.items()}

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        answers = [[row["completion"] for row in item.generations] for item in batch]
        questions = [
            self._questions(prompt_text(item.prompt["messages"]), texts)
            for item, texts in zip(batch, answers, strict=True)
        ]
        samples = self.config.samples
        requests = [
            self._request(question, sample) for group in questions for question in group for sample in range(samples)
        ]
        replies = self._ask(requests)
        judgements = [self._read(reply) for reply in replies]
        means = iter([self._mean(judgements[start : start + samples]) for start in range(0, len(judgements), samples)])
        return [
            self._scores(len(texts), list(islice(means, len(group))))
            for texts, group in zip(answers, questions, strict=True)
        ]

    def _ask(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """The replies in order; accounts for tokens and, with somebody else's server, for the time of waiting."""
        before = Counter(self.endpoint.counts)
        waiting = self.services.waiting() if self.config.serve is None else nullcontext()
        with waiting:
            replies = self.endpoint.ask(requests, lambda count: self.services.compared(count / self.config.samples))
        spent = self.endpoint.counts - before
        model = self.endpoint.server.model if self.endpoint.server else ""
        self.services.used(model, spent["prompt_tokens"], spent["completion_tokens"])
        return replies

    def _questions(self, prompt: str, answers: Sequence[str]) -> list[str]:
        """The judge's prompts for one prompt's answers: one per answer, or one per ordered pair."""
        wording = self.config.prompt
        if self.config.mode == "rubric":
            return [_fill(wording or RUBRIC, prompt=prompt, response=answer) for answer in answers]
        if wording is None:
            wording = PAIRWISE + (VERDICT if self.config.mode == "pairwise" else LETTER)
        return [
            _fill(wording, prompt=prompt, first=first, second=second)
            for i, first in enumerate(answers)
            for j, second in enumerate(answers)
            if i != j
        ]

    def _request(self, question: str, sample: int) -> dict[str, Any]:
        config = self.config
        request = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "sample": sample,
        }
        if config.temperature > 0:
            request["seed"] = sample
        if config.mode == "logprob":
            request |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return request | config.extra

    def _read(self, reply: Reply) -> Judgement:
        if reply.failure:
            return reply.failure
        if self.config.mode == "rubric":
            return read_score(reply)
        if self.config.mode == "logprob":
            return read_letter(reply)
        return read_verdict(reply, self.config.verdict_logit)

    def _mean(self, judgements: Sequence[Judgement]) -> Judgement:
        """The mean of the numbers, or the first reason if there is none."""
        reasons = [value for value in judgements if isinstance(value, str)]
        numbers = [value for value in judgements if not isinstance(value, str)]
        self.reasons.update(reasons)
        if numbers:
            return float(np.mean(numbers))
        return reasons[0]

    def _scores(self, count: int, judgements: Sequence[Judgement]) -> Scores:
        """The scores of one prompt's candidates from the judgements of its questions."""
        numbers = np.array([math.nan if isinstance(value, str) else value for value in judgements])
        reasons = [value if isinstance(value, str) else "" for value in judgements]
        if self.config.mode == "rubric":
            return Scores.of_points(numbers, reasons)
        off_diagonal = ~np.eye(count, dtype=bool)
        logits, causes = np.zeros((count, count)), np.full((count, count), "", dtype=object)
        logits[off_diagonal], causes[off_diagonal] = numbers, reasons
        # For each candidate: what spoilt the first comparison that it was in.
        first = [next((cause for cause in (*causes[k], *causes[:, k]) if cause), "") for k in range(count)]
        return Scores.of_comparisons(logits, first)


def _fill(wording: str, **values: str) -> str:
    """The wording with every placeholder replaced, in one pass: braces inside a value stay."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], wording)


def read_score(reply: Reply) -> Judgement:
    """The last `Score: x` of a reply, if x is in [0, 5]."""
    value = last_score(reply.text)
    if value is None:
        return "judge gave no score"
    if 0 <= value <= 5:
        return value
    return "judge's score is out of range"


def read_verdict(reply: Reply, logit: float) -> Judgement:
    """+logit, -logit or 0 for the [[A]], [[B]] or [[C]] of a reply."""
    verdict = only_verdict(reply.text, list(SIGNS))
    if verdict is not None:
        return SIGNS[verdict] * logit
    if is_contradiction(reply.text, list(SIGNS)):
        return "judge gave several verdicts"
    return "judge gave no verdict"


def read_letter(reply: Reply) -> Judgement:
    """Return log p(A) - log p(B) of the one token, over all spellings.

    A letter that is not listed counts as the least likely listed token.
    """
    try:
        listed = (reply.body or {})["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(bare_token(item["token"]).upper(), float(item["logprob"])) for item in listed]
        logps = {letter: [logp for token, logp in pairs if token == letter] for letter in "AB"}
        floor = min(logp for _, logp in pairs)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return "judge gave no log-probs"
    if not any(logps.values()):
        return "judge named neither A nor B"
    first, second = (float(np.logaddexp.reduce(logps[letter] or [floor])) for letter in "AB")
    if math.isfinite(first) and math.isfinite(second):
        return first - second
    return "judge gave no log-probs"
