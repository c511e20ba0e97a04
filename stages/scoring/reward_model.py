"""Stages - pointwise scorers with one forward per candidate: chat reward models (`reward_model`) and prompt-answer encoders (`pair_encoder`).

A text that is too long loses the beginning of its prompt, never the end of its answer: that is what is being judged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_contracts.errors import ConfigError, ContractError
from stages.models.lazy import torch
from stages.models.policy import batches_by_budget, pick_device, pin_threads
from stages.models.tokens import context_length
from stages.scoring.base import Candidates, Scores, Surroundings, prompt_text
from stages.scoring.models import ModelScorerConfig, local_directory, locate, refuse_remote_code
from stages.scoring.pairrm_tokens import Limits, blank, load_tokenizer


class ClassifierConfig(ModelScorerConfig):
    max_tokens: int | None = Field(None, ge=16)
    """Longest input; None: what the model and its tokenizer say, 2048 if neither does."""
    output: int = Field(0, ge=0)
    """Which of the model's outputs is the score."""
    trust_remote_code: bool = False
    """Run Python code that the model brings along. Read it first."""


class PointwiseScorer:
    """Loading, batching and bookkeeping; a subclass says how texts become ids and what the network makes of them."""

    TEXT_ONLY = True

    def __init__(self, config: Any, device: str):
        self.config, self.device, self.batch_tokens = config, device, 4096
        self.used: Any = lambda model, tokens_in: None
        self.directory: Path | str = ""
        self.network: Any = None

    @staticmethod
    def needs_start_logps(config: Any) -> bool:
        return False

    @staticmethod
    def check_prompts(config: Any, prompts: Sequence[dict[str, Any]]) -> None:
        if (directory := local_directory(config.model, config.name)) is not None:
            refuse_remote_code(
                json.loads((directory / "config.json").read_text()),
                directory,
                getattr(config, "trust_remote_code", False),
            )

    def prepare(self, surroundings: Surroundings) -> None:
        self.batch_tokens, self.used = surroundings.batch_tokens, surroundings.used

    def open(self, directory: Path) -> None:
        """Set `network` and whatever `encode` needs."""
        raise NotImplementedError

    def encode(self, messages: Sequence[dict[str, str]], answer: str) -> list[int]:
        raise NotImplementedError

    def forward(self, rows: list[list[int]]) -> list[float]:
        raise NotImplementedError

    def score(self, batch: Sequence[Candidates]) -> list[Scores]:
        if self.network is None:
            pin_threads(None)
            self.directory = locate(self.config.model, self.config.name)
            self.open(self.directory)
        encoded = [
            self.encode(item.prompt["messages"], row["completion"]) for item in batch for row in item.generations
        ]
        values = np.full(len(encoded), np.nan)
        with torch.inference_mode():
            for rows in batches_by_budget([len(ids) for ids in encoded], self.batch_tokens):
                values[rows] = self.forward([encoded[row] for row in rows])
        self.used(self.directory, sum(map(len, encoded)))
        if not np.isfinite(values).all():
            raise ContractError(
                f"the scorer {self.config.name} gives NaN or infinity: its weights are damaged, or {self.config.dtype} is too narrow"
            )
        results, start = [], 0
        for item in batch:
            results.append(Scores(values[start : start + len(item.generations)], None, [""] * len(item.generations)))
            start += len(item.generations)
        return results

    def limit(self, directory: Path, tokenizer_limit: int | None) -> int:
        if getattr(self.config, "max_tokens", None):
            return self.config.max_tokens
        known = [length for length in (context_length(directory), tokenizer_limit) if length and length < 1_000_000]
        return min(known, default=2048)


def keep_the_end(ids: list[int], limit: int, first: int | None) -> list[int]:
    """The last `limit` ids, behind the opening control token if there was one."""
    if len(ids) <= limit:
        return ids
    return [first, *ids[-(limit - 1) :]] if first is not None and ids[0] == first else ids[-limit:]


def padded(rows: list[list[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Right-padded ids and mask. [N, L] each."""
    ids = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def load_classifier(directory: Path, config: ClassifierConfig, device: str) -> Any:
    """Raises: ConfigError for a model with code of its own, without a trained head, or without the output asked for."""
    from transformers import AutoModelForSequenceClassification

    settings = json.loads((directory / "config.json").read_text())
    refuse_remote_code(settings, directory, config.trust_remote_code)
    model, told = AutoModelForSequenceClassification.from_pretrained(
        str(directory),
        dtype=getattr(torch, config.dtype),
        local_files_only=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(told["missing_keys"]):
        raise ConfigError(
            f"{directory} lacks {len(missing)} tensors of a sequence classifier, e.g. {missing[:3]}: it is no reward model"
        )
    if config.output >= model.config.num_labels:
        raise ConfigError(
            f"{directory} has {model.config.num_labels} output(s); scorer.output is {config.output}, and counts from 0"
        )
    return model.to(device).eval()


class RewardModel(PointwiseScorer):
    class Config(ClassifierConfig):
        """Any `AutoModelForSequenceClassification` trained on chats, e.g. Skywork-Reward; the score is its raw output."""

        name: Literal["reward_model"] = "reward_model"

    def open(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the reward model {directory} has no chat template; for a prompt-answer encoder use {{name: pair_encoder}}"
            )
        self.network = load_classifier(directory, self.config, pick_device(self.device))
        self.longest = self.limit(directory, self.tokenizer.model_max_length)

    def encode(self, messages: Sequence[dict[str, str]], answer: str) -> list[int]:
        chat = [
            *({"role": m["role"], "content": m["content"]} for m in messages),
            {"role": "assistant", "content": answer},
        ]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False)
        # The template writes its own control tokens.
        return keep_the_end(
            list(self.tokenizer(text, add_special_tokens=False).input_ids), self.longest, self.tokenizer.bos_token_id
        )

    def forward(self, rows: list[list[int]]) -> list[float]:
        config = self.network.config
        given = config.pad_token_id
        # The network finds the last token by the padding id: without one of its own, take an id that no row holds.
        pad = (
            given
            if given is not None
            else next(i for i in range(config.get_text_config().vocab_size) if all(i not in row for row in rows))
        )
        config.pad_token_id = config.get_text_config().pad_token_id = pad
        try:
            ids, mask = padded(rows, pad, self.network.device)
            return self.network(input_ids=ids, attention_mask=mask).logits[:, self.config.output].float().cpu().tolist()
        finally:
            config.pad_token_id = config.get_text_config().pad_token_id = given


class PairEncoder(PointwiseScorer):
    """[CLS] prompt [SEP] answer [SEP], as OpenAssistant/reward-model-deberta-v3-large-v2 reads them."""

    class Config(ClassifierConfig):
        name: Literal["pair_encoder"] = "pair_encoder"

    def open(self, directory: Path) -> None:
        self.network = load_classifier(directory, self.config, pick_device(self.device))
        self.is_deberta = self.network.config.model_type == "deberta-v2"
        if self.is_deberta:  # transformers 5 would lose the NFKC map
            self.tokenizer: Any = load_tokenizer(directory, Limits())
            self.cls, self.sep, self.pad, told = (
                [self.tokenizer.cls_id],
                [self.tokenizer.sep_id],
                self.tokenizer.pad_id,
                None,
            )
        else:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
            first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            if first is None or last is None:
                raise ConfigError(f"the tokenizer of {directory} has no [CLS] and [SEP]: it encodes no pairs of texts")
            self.cls, self.sep, self.pad, told = (
                [first],
                [last],
                self.tokenizer.pad_token_id or 0,
                self.tokenizer.model_max_length,
            )
        self.longest = self.limit(directory, told)

    def _ids(self, text: str) -> list[int]:
        if self.is_deberta:
            return self.tokenizer.backend.encode(blank(text), add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, messages: Sequence[dict[str, str]], answer: str) -> list[int]:
        room = self.longest - 3
        answer_ids = self._ids(answer)[-room:]
        prompt_ids = self._ids(prompt_text({"messages": messages}))
        prompt_ids = prompt_ids[max(0, len(prompt_ids) - (room - len(answer_ids))) :]
        return [*self.cls, *prompt_ids, *self.sep, *answer_ids, *self.sep]

    def forward(self, rows: list[list[int]]) -> list[float]:
        ids, mask = padded(rows, self.pad, self.network.device)
        more = {}
        if (getattr(self.network.config, "type_vocab_size", 0) or 0) > 1:  # BERT: the answer is of type 1
            after_sep = torch.cumsum((ids == self.sep[0]).long(), dim=1) - (ids == self.sep[0]).long()
            more["token_type_ids"] = ((after_sep >= 1) & mask.bool()).long()
        return (
            self.network(input_ids=ids, attention_mask=mask, **more)
            .logits[:, self.config.output]
            .float()
            .cpu()
            .tolist()
        )
