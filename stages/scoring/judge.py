r"""Stages - the `llm_judge` scorer: a language model behind an OpenAI-compatible endpoint says how good candidates are.

    rubric     additive: a point for each of five properties, `Score: x`, the mean of `samples` (Yuan et al. 2024, arXiv:2401.10020)
    pairwise   which of two is better, both orders; L_ij = +v, -v or 0 for [[A]], [[B]], [[C]] with i shown as A
    logprob    the same question answered by one token; L_ij = log p(A) - log p(B) (as AlpacaEval 2 weighs its verdicts)

A reply that cannot be read, is out of range, or never came is no number: the candidate (or the comparison) is unscored, with the reason.
The wording of the prompts is ours.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from data_contracts.errors import TransientError
from data_contracts.identity import canonical_json, digest_text
from stages.models.policy import pick_device
from stages.registry import Named
from stages.scoring.base import Candidates, Scores, Surroundings, prompt_text
from stages.scoring.endpoint import Endpoint, EndpointRuntime, Reply
from stages.scoring.models import NamedModel, local_directory, locate
from stages.scoring.served import Served, ServerRuntime

RUBRIC = """You are grading one answer to a user's request. Start at 0 and add one point for each statement that is true of it:

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

PAIRWISE = """Two answers to the same request follow. Decide which one serves the user better: correct first, then helpful, complete and clear.
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
VERDICT = "Say in at most 80 words what decides it. Then end with [[A]] if answer A is better, [[B]] if answer B is, [[C]] if they are equal."
LETTER = "Reply with one letter only, A or B, and nothing else: the better answer is"

_SCORE = re.compile(r"score[*_`\s]*:[*_`\s]*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")


class LLMJudge:
    TEXT_ONLY = True

    class Config(Named):
        """One greedy judgement by the additive rubric."""

        NEUTRAL: ClassVar[dict[str, Any]] = {"serve": None}

        name: Literal["llm_judge"] = "llm_judge"
        model: str
        """The judge's name at the endpoint. With `mode` and prompts it is what a score depends on; the address is not."""
        mode: Literal["rubric", "pairwise", "logprob"] = "rubric"
        samples: int = Field(1, ge=1, le=64)
        """Judgements per candidate or comparison; the ones that can be read are averaged. More than 1 needs a temperature."""
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
        """The judge's own weights: the stage runs `vllm serve` of them for as long as it lasts, and base_url is not asked. `model` is then
        only a label. None: somebody else serves it."""
        server: ServerRuntime = ServerRuntime()
        """How it is served then."""
        runtime: EndpointRuntime = EndpointRuntime()

        @field_validator("prompt")
        @classmethod
        def _has_places(cls, value: str | None, info: Any) -> str | None:
            wanted = (
                ("{prompt}", "{response}") if info.data.get("mode") == "rubric" else ("{prompt}", "{first}", "{second}")
            )
            if value is not None and (missing := [place for place in wanted if place not in value]):
                raise ValueError(f"the judge's prompt has no place for {' and '.join(missing)}")
            return value

    def __init__(self, config: Config, device: str):
        self.config, self.device, self.reasons = config, device, Counter()
        # Judgements are kept by the judge's name, so that of weights of one's own says which weights.
        self.name = (
            config.model
            if config.serve is None
            else f"{config.model}@{digest_text(canonical_json(config.serve.identity()))[:12]}"
        )
        self.endpoint = Endpoint(config.runtime, None, self._server())
        self.compared: Any = lambda count: None
        self.surroundings: Surroundings | None = None

    @staticmethod
    def needs_start_logps(config: Config) -> bool:
        return False

    @staticmethod
    def compares(config: Config) -> bool:
        return config.mode != "rubric"

    @staticmethod
    def check_prompts(config: Config, prompts: Sequence[dict[str, Any]]) -> None:
        if config.serve is not None:
            local_directory(config.serve, config.name)

    def prepare(self, surroundings: Surroundings) -> None:
        self.endpoint = Endpoint(self.config.runtime, surroundings.store_root, self._server())
        self.compared, self.surroundings = surroundings.compared, surroundings

    def _server(self) -> Served | None:
        config = self.config
        if config.serve is None:
            return None
        return Served(config.server, locate(config.serve, config.name), self.name, pick_device(self.device))

    def close(self) -> None:
        if self.endpoint.server is not None:
            self.endpoint.server.close()

    def metrics(self) -> dict[str, float]:
        """Since the start: requests asked, found in the cache and failed; replies that could not be used, by reason."""
        counts = {f"judge/{name}": float(self.endpoint.counts[name]) for name in ("asked", "cached", "failed")}
        return counts | {f"judge/{reason}": float(count) for reason, count in self.reasons.items()}

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        texts = [[row["completion"] for row in item.generations] for item in batch]
        questions = [
            self._questions(prompt_text(item.prompt), answers) for item, answers in zip(batch, texts, strict=True)
        ]
        flat = [
            self._request(text, sample) for one in questions for text in one for sample in range(self.config.samples)
        ]
        replies = self._ask(flat)
        if flat and all(reply.failure == "judge cannot be reached" for reply in replies):
            raise TransientError(
                f"nobody answers at {self.endpoint.url}: start the judge, e.g. `vllm serve {self.config.model}`, or set runtime.base_url"
            )
        found = iter(
            [self._mean([self._read(reply) for reply in group]) for group in _grouped(replies, self.config.samples)]
        )
        return [
            self._scores(len(answers), [next(found) for _ in one])
            for answers, one in zip(texts, questions, strict=True)
        ]

    def _ask(self, requests: Sequence[dict[str, Any]]) -> list[Reply]:
        """Their replies; the stage learns of the tokens, and that it waited for somebody else's server."""
        before = Counter(self.endpoint.counts)
        told = self.surroundings
        with told.waiting() if told is not None and self.config.serve is None else nullcontext():
            replies = self.endpoint.ask(requests, lambda count: self.compared(count / self.config.samples))
        if told is not None:
            spent = self.endpoint.counts - before
            told.used(
                self.endpoint.server.model if self.endpoint.server else "",
                spent["prompt_tokens"],
                spent["completion_tokens"],
            )
        return replies

    def _questions(self, prompt: str, answers: Sequence[str]) -> list[str]:
        if self.config.mode == "rubric":
            return [_fill(self.config.prompt or RUBRIC, prompt=prompt, response=answer) for answer in answers]
        wording = self.config.prompt or PAIRWISE + (VERDICT if self.config.mode == "pairwise" else LETTER)
        return [
            _fill(wording, prompt=prompt, first=first, second=second)
            for i, first in enumerate(answers)
            for j, second in enumerate(answers)
            if i != j
        ]

    def _request(self, text: str, sample: int) -> dict[str, Any]:
        config = self.config
        request = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "sample": sample,
        }
        if config.temperature > 0:
            request["seed"] = sample
        if config.mode == "logprob":
            request |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return request | config.extra

    def _read(self, reply: Reply) -> float | str:
        """A number, or the reason why there is none."""
        if reply.failure:
            return reply.failure
        return {"rubric": read_score, "pairwise": self._verdict, "logprob": read_letter}[self.config.mode](reply)

    def _verdict(self, reply: Reply) -> float | str:
        found = _VERDICT.findall(reply.text)
        return (
            {"A": 1.0, "B": -1.0, "C": 0.0}[found[-1]] * self.config.verdict_logit if found else "judge gave no verdict"
        )

    def _mean(self, values: list[float | str]) -> float | str:
        self.reasons.update(value for value in values if isinstance(value, str))
        numbers = [value for value in values if not isinstance(value, str)]
        return float(np.mean(numbers)) if numbers else next(value for value in values if isinstance(value, str))

    def _scores(self, count: int, values: list[float | str]) -> Scores:
        numbers = np.array([math.nan if isinstance(value, str) else value for value in values])
        reasons = [value if isinstance(value, str) else "" for value in values]
        if self.config.mode == "rubric":
            return Scores(numbers, None, reasons)
        off = ~np.eye(count, dtype=bool)
        logits, told = np.zeros((count, count)), np.full((count, count), "", dtype=object)
        logits[off], told[off] = numbers, reasons
        # Of a candidate: what spoilt the first comparison it was in.
        first = [next((text for text in (*told[k], *told[:, k]) if text), "") for k in range(count)]
        return Scores(None, logits, first)


def _fill(wording: str, **values: str) -> str:
    """Every place in one pass: braces inside a text are text."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], wording)


def _grouped(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def read_score(reply: Reply) -> float | str:
    """The last `Score: x`, if x is in [0, 5]."""
    found = _SCORE.findall(reply.text)
    if not found:
        return "judge gave no score"
    value = float(found[-1])
    return value if 0 <= value <= 5 else "judge's score is out of range"


def read_letter(reply: Reply) -> float | str:
    """log p(A) - log p(B) of the one token, over all its spellings. A letter beyond the listed ones counts as the last of them."""
    try:
        listed = reply.body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logps = {
            letter: [item["logprob"] for item in listed if item["token"].strip().upper() == letter] for letter in "AB"
        }
        floor = min(item["logprob"] for item in listed)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return "judge gave no log-probs"
    if not any(logps.values()):
        return "judge named neither A nor B"
    first, second = (float(np.logaddexp.reduce(logps[letter] or [floor])) for letter in "AB")
    return first - second if math.isfinite(first) and math.isfinite(second) else "judge gave no log-probs"
