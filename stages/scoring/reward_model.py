"""Stages - scorers with one forward per candidate: `reward_model` (chats) and `pair_encoder` (prompt and answer).

A text that is too long loses the beginning of its prompt, never the end of its answer: that is what is being judged. It
is counted, and its score carries that reason; too many of them end the stage.

Axes: N rows, L padded tokens.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from data_contracts.checkpoint import ModelRef
from data_contracts.errors import ConfigError, ContractError
from data_contracts.prompts import Message, PromptRow
from stages.models import tokens
from stages.models.architecture import refuse_misfit
from stages.models.data_text import TextEncoder
from stages.models.lazy import import_transformers, torch
from stages.models.policy import batches_by_budget, pick_device, pin_threads
from stages.models.tokens import context_length
from stages.models.turns import turns_of_reader
from stages.scoring import pairrm_tokens
from stages.scoring.base import Candidates, Scores, by_prompt, prompt_text
from stages.scoring.models import (
    ModelScorer,
    ModelScorerConfig,
    local_directory,
    locate,
    read_in_float32,
    refuse_remote_code,
)
from stages.scoring.pairrm_tokens import Limits, blank

if TYPE_CHECKING:
    from torch import Tensor

Messages = Sequence[Message]
CUT = "cut on the left to the scorer's longest input"
"""What spoilt the score of a text that was too long."""
UNLIMITED = 1_000_000
"""Tokenizers without a limit of their own say an astronomic number."""


class PointScorerConfig(ModelScorerConfig):
    NEUTRAL: ClassVar[dict[str, Any]] = {"max_cut_share": 0.1}

    max_cut_share: float = Field(0.1, ge=0, le=1)
    """The stage ends if a larger share of the texts scored at once is longer than `max_tokens`: two answers to
    different questions would be one text."""


class ClassifierConfig(PointScorerConfig):
    max_tokens: int | None = Field(None, ge=16)
    """Longest input; None: what the model and its tokenizer say, 2048 if neither does."""
    output: int = Field(0, ge=0)
    """Which of the model's outputs is the score."""
    trust_remote_code: bool = False
    """Run Python code that the model brings along. Read it first."""


class Encoded(NamedTuple):
    """A text as a network reads it."""

    ids: list[int]
    is_cut: bool = False
    """Whether it was longer."""


class PointScorer(ModelScorer):
    """Base of scorers by one network. A subclass turns texts into ids, and ids into numbers."""

    TEXT_ONLY = True

    def __init__(self, config: Any, device: str):
        super().__init__(config, device)
        self.directory: Path | None = None
        """The model's, once it is loaded."""
        self.longest = UNLIMITED
        """Tokens that an input may have; set by `load`."""
        self.num_cut = 0
        """Texts that were cut since the start."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Load the network and whatever `encode` needs."""

    @abstractmethod
    def encode(self, messages: Messages, answer: str) -> Encoded:
        """The ids of one prompt with one answer, at most `longest`."""

    @abstractmethod
    def forward(self, rows: list[list[int]]) -> list[float]:
        """The score of each row of ids, in order."""

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.directory is None:
            pin_threads(None)
            directory = locate(self.config.model, self.config.name)
            self.load(directory)
            self.directory = directory
        texts = [self.encode(item.prompt["messages"], row["completion"]) for item in batch for row in item.generations]
        rows = [text.ids for text in texts]
        self._count_cut([text.is_cut for text in texts])
        points = np.full(len(rows), np.nan)
        with torch.inference_mode():
            for numbers in batches_by_budget([len(ids) for ids in rows], self.tokens_per_forward()):
                points[numbers] = self.forward([rows[number] for number in numbers])
        self.services.used(self.directory, sum(map(len, rows)))
        if not np.isfinite(points).all():
            raise ContractError(
                f"the scorer {self.config.name} gives NaN or infinity: its weights are damaged, or {self.arithmetic()} "
                "is too narrow"
            )
        reasons = by_prompt([CUT if text.is_cut else "" for text in texts], batch)
        return [
            Scores.of_points(part, causes)
            for part, causes in zip(by_prompt(points.tolist(), batch), reasons, strict=True)
        ]

    def _count_cut(self, cut: Sequence[bool]) -> None:
        """Say how many texts are too long. Raises: ConfigError if they are more than `max_cut_share`."""
        count, name = sum(cut), self.config.name
        if not count:
            return
        self.num_cut += count
        message = (
            f"{count} of {len(cut)} texts are longer than the {self.longest} tokens that the scorer {name} reads, and "
            "lose the beginning of their prompt"
        )
        if count > self.config.max_cut_share * len(cut):
            raise ConfigError(
                f"{message}: more than scorer.max_cut_share = {self.config.max_cut_share:g}. Raise scorer.max_tokens if "
                "the model's context is longer, leave out long prompts, or set max_cut_share to score them as they are"
            )
        self.services.log(f"warning: {message}")

    def metrics(self) -> dict[str, float]:
        """The texts that were cut since the start, if any."""
        return {"cut_texts": float(self.num_cut)} if self.num_cut else {}


def longest_input(config: Any, directory: Path, tokenizer_limit: int | None) -> int:
    """Tokens that an input may have: `max_tokens`, or what the model and its tokenizer say."""
    if config.max_tokens is not None:
        return config.max_tokens
    limits = [limit for limit in (context_length(directory), tokenizer_limit) if limit and limit < UNLIMITED]
    return min(limits, default=2048)


def chat(messages: Messages, answer: str) -> list[Message]:
    """The conversation that a chat reward model reads."""
    turns = [Message(role=message["role"], content=message["content"]) for message in messages]
    return [*turns, Message(role="assistant", content=answer)]


def keep_the_end(ids: list[int], limit: int, first: int | None, header: slice) -> list[int]:
    """The last `limit` ids, behind the opening control token if there was one.

    header: where the answer's role mark stands; of an answer that leaves no room for it, its beginning is lost instead.
    """
    opening = [first] if first is not None and ids[0] == first else []
    room = limit - len(opening)
    mark = ids[header]
    if len(ids) - header.start <= room or len(mark) >= room:
        return [*opening, *ids[-room:]]
    return [*opening, *mark, *ids[-(room - len(mark)) :]]


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def padded(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask. [N, L] each."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def load_classifier(directory: Path, config: ClassifierConfig, dtype: str, device: str) -> Any:
    """The network, a transformers model, in eval mode.

    Raises: ConfigError for a model with code of its own, without a trained head, or without the output asked for.
    """
    settings = json.loads((directory / "config.json").read_text())
    refuse_remote_code(settings, directory, config.trust_remote_code)
    model, report = import_transformers().AutoModelForSequenceClassification.from_pretrained(
        str(directory),
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below, by name
        output_loading_info=True,
    )
    refuse_misfit(directory, model, report)
    if config.output >= model.config.num_labels:
        raise ConfigError(
            f"{directory} has {model.config.num_labels} output(s); scorer.output is {config.output}, and counts from 0"
        )
    for name in ("score", "classifier"):  # as transformers' sequence classifiers call their head
        if (head := getattr(model, name, None)) is not None:
            read_in_float32(head)
    return model.to(device).eval()


class ClassifierScorer(PointScorer):
    """Base of scorers by a transformers sequence classifier; its raw output is the score."""

    TASK = "classifier"

    @classmethod
    def models(cls, config: Any) -> list[tuple[ModelRef, str]]:
        # With code of its own, only that code knows which tensors there must be; `load_classifier` compares them.
        return [(config.model, "" if config.trust_remote_code else cls.TASK)]

    @classmethod
    def check_prompts(cls, config: Any, prompts: Sequence[PromptRow]) -> None:
        directory = local_directory(config.model, config.name)
        if directory is not None:
            settings = json.loads((directory / "config.json").read_text())
            refuse_remote_code(settings, directory, config.trust_remote_code)
            refuse_long_prompts(config, directory, prompts)


def refuse_long_prompts(config: PointScorerConfig, directory: Path, prompts: Sequence[PromptRow]) -> None:
    """Raises: ConfigError if more than `max_cut_share` of the prompts fill the scorer's longest input without an answer."""
    longest, most = longest_input(config, directory, None), config.max_cut_share * len(prompts)
    texts = (prompt_text(prompt["messages"]) for prompt in prompts)
    suspects = [number for number, text in enumerate(texts) if len(text.encode()) >= longest]
    if len(suspects) <= most:  # a token is a byte of text at least: no tokenizer is needed
        return
    tokenizer = tokens.load_tokenizer(directory)
    sizes = [len(tokenizer.encode(prompt_text(prompts[k]["messages"]), add_special_tokens=False)) for k in suspects]
    count = sum(size >= longest for size in sizes)
    if count > most:
        raise ConfigError(
            f"{count} of {len(prompts)} prompts have {longest} tokens and more, all that the scorer {config.name} reads: "
            f"with an answer they are cut, and more than scorer.max_cut_share = {config.max_cut_share:g} of the texts "
            "would be. Raise scorer.max_tokens if the model's context is longer, leave out long prompts, or set "
            "max_cut_share to score them as they are"
        )


class RewardModel(ClassifierScorer):
    VERSION = "2"

    class Config(ClassifierConfig):
        """Any `AutoModelForSequenceClassification` trained on chats, e.g. Skywork-Reward; the score is its raw
        output."""

        name: Literal["reward_model"] = "reward_model"

    def load(self, directory: Path) -> None:
        self.turns = turns_of_reader(directory)
        if self.turns.chat is None:
            raise ConfigError(
                f"the reward model {directory} has no chat template; "
                f"for a prompt-answer encoder use {{name: pair_encoder}}"
            )
        self.network = load_classifier(directory, self.config, self.arithmetic(), pick_device(self.device))
        self.longest = longest_input(self.config, directory, self.turns.tokenizer.model_max_length)

    def encode(self, messages: Messages, answer: str) -> Encoded:
        ids = self.turns.conversation(chat(messages, answer))
        if len(ids) <= self.longest:
            return Encoded(ids)
        # The answer's role mark: what a conversation with no answer adds to the prompt before it goes another way.
        start = common_length(ids, self.turns.conversation(messages))
        end = max(start, common_length(ids, self.turns.conversation(chat(messages, ""))))
        first = self.turns.tokenizer.bos_token_id
        return Encoded(keep_the_end(ids, self.longest, first, slice(start, end)), is_cut=True)

    def forward(self, rows: list[list[int]]) -> list[float]:
        config = self.network.config
        configured_pad = config.pad_token_id
        pad = configured_pad
        if pad is None:
            # The network finds the last token by the padding id: take an id that no row holds.
            vocabulary = range(config.get_text_config().vocab_size)
            pad = next(token for token in vocabulary if all(token not in row for row in rows))
        config.pad_token_id = config.get_text_config().pad_token_id = pad
        try:
            ids, mask = padded(rows, pad, self.network.device)
            logits = self.network(input_ids=ids, attention_mask=mask).logits
        finally:
            config.pad_token_id = config.get_text_config().pad_token_id = configured_pad
        return logits[:, self.config.output].float().cpu().tolist()


class PairEncoder(ClassifierScorer):
    """[CLS] prompt [SEP] answer [SEP], as OpenAssistant/reward-model-deberta-v3-large-v2 reads them."""

    class Config(ClassifierConfig):
        name: Literal["pair_encoder"] = "pair_encoder"

    def load(self, directory: Path) -> None:
        self.network = load_classifier(directory, self.config, self.arithmetic(), pick_device(self.device))
        self.is_deberta = self.network.config.model_type == "deberta-v2"
        limit = None
        if self.is_deberta:  # transformers 5 would lose the NFKC map
            self.tokenizer: Any = pairrm_tokens.load_tokenizer(directory, Limits())
            first, last, self.pad = self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.pad_id
        else:
            self.tokenizer = tokens.load_tokenizer(directory)
            self.text = TextEncoder(self.tokenizer, self.tokenizer.all_special_tokens)
            first, last, self.pad = (
                self.tokenizer.cls_token_id,
                self.tokenizer.sep_token_id,
                self.tokenizer.pad_token_id or 0,
            )
            limit = self.tokenizer.model_max_length
        if first is None or last is None:
            raise ConfigError(f"the tokenizer of {directory} has no [CLS] and [SEP]: it encodes no pairs of texts")
        self.cls, self.sep = first, last
        self.longest = longest_input(self.config, directory, limit)

    def _ids(self, text: str) -> list[int]:
        if self.is_deberta:
            return self.tokenizer.backend.encode(blank(text), add_special_tokens=False).ids
        return self.text.encode(text)

    def encode(self, messages: Messages, answer: str) -> Encoded:
        room = self.longest - 3
        whole_answer, whole_prompt = self._ids(answer), self._ids(prompt_text(messages))
        answer_ids = whole_answer[-room:]
        prompt_ids = whole_prompt[max(0, len(whole_prompt) - (room - len(answer_ids))) :]
        is_cut = len(whole_prompt) + len(whole_answer) > room
        return Encoded([self.cls, *prompt_ids, self.sep, *answer_ids, self.sep], is_cut)

    def forward(self, rows: list[list[int]]) -> list[float]:
        ids, mask = padded(rows, self.pad, self.network.device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if (getattr(self.network.config, "type_vocab_size", 0) or 0) > 1:  # BERT: the answer is of type 1
            separators = (ids == self.sep).long()
            behind_prompt = torch.cumsum(separators, dim=1) - separators >= 1
            inputs["token_type_ids"] = (behind_prompt & mask.bool()).long()
        return self.network(**inputs).logits[:, self.config.output].float().cpu().tolist()
