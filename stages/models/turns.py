"""Stages - the turn contract: what a policy reads before its answer, and what stands at the answer's end.

    prompt    the template with its generation prompt: exactly the BOS that the template writes
    response  the answer's tokens, then the terminator: the first special token that the template writes after an
              assistant turn; the EOS where it writes none, and for plain text
    stop ids  the terminator, the EOS, and the ids of generation_config.json: the first of them ends a sampled response

Prompt and response are tokenised apart and joined, so the seam lies at the same token in every model and every pass,
and a prompt is a prefix of prompt and response. Text out of data never becomes a control token
(stages/models/data_text.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError
from data_contracts.identity import digest_text
from data_contracts.prompts import Message, name_of
from stages.models.data_text import TextEncoder
from stages.models.templates import (
    ChatTemplate,
    Messages,
    literals,
    read_json,
)
from stages.models.tokens import load_tokenizer, tokenizer_digest, vocabulary_size
from stages.models.turn_settings import MARK, JinjaFile, PlainLayout, TurnConfig

DROPPED = "a control token in the text"
"""Reason of a row that `special_tokens_in_data: drop` leaves out."""
GIVEN_TEXTS = ("response", "chosen", "rejected")
"""Fields of a prompt row that hold answers."""


class Turns:
    """One model's tokenizer under the turn contract. Token ids are lists of int throughout.

    Raises: ConfigError if the model has no chat template where one is asked for, or nothing that ends a response.
    """

    def __init__(self, directory: str | Path, settings: TurnConfig | None = None, tokenizer: Any = None):
        self.directory, self.settings = Path(directory), settings or TurnConfig()
        self.tokenizer = load_tokenizer(directory) if tokenizer is None else tokenizer
        self.chat = self._chat_template()
        tokens = self.tokenizer.added_tokens_decoder
        controls = {token.content for token in tokens.values() if token.special} | set(
            self.tokenizer.all_special_tokens
        )
        if self.chat is not None:
            controls |= self.chat.role_marks(token.content for token in tokens.values() if not token.special)
        self.text = TextEncoder(self.tokenizer, controls)
        self.control_ids = frozenset(self.tokenizer.convert_tokens_to_ids(self.text.controls)) - {None}
        end = None if self.chat is None else self.chat.end_of_turn(self.text.controls)
        self.terminator = self._ending(end)
        self.stop_ids = self._stop_ids()
        self._check_embedding(tokens)

    def _chat_template(self) -> ChatTemplate | None:
        if not self.settings.is_chat:
            return None
        if isinstance(self.settings.template, JinjaFile):
            source = self.settings.template.jinja
        else:
            source = self.tokenizer.chat_template
            source = source.get("default") if isinstance(source, dict) else source
        if not source:
            raise ConfigError(
                f"the model in {self.directory} has no chat template, and chat prompts need one: "
                "use an instruct model, give sampling.template {file: x.jinja}, or set it to plain"
            )
        return ChatTemplate(source, self.tokenizer.special_tokens_map | self.settings.template_kwargs)

    def _ending(self, end: str | None) -> int:
        if end is not None:
            return self.tokenizer.convert_tokens_to_ids(end)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ConfigError(
                f"the tokenizer in {self.directory} has no EOS token, and its template writes no special token after "
                "an answer: a finished response cannot be told from a cut one. Set `eos_token` in tokenizer_config.json"
            )
        return eos

    def _stop_ids(self) -> list[int]:
        eos_setting = read_json(self.directory / "generation_config.json").get("eos_token_id")
        listed = [eos_setting]
        if isinstance(eos_setting, list):
            listed = eos_setting
        size = vocabulary_size(self.directory)
        for value in listed:
            if value is not None and (type(value) is not int or value < 0 or (size is not None and value >= size)):
                below = f" below {size}" if size else ""
                raise ConfigError(
                    f"generation_config.json of {self.directory}: "
                    f"eos_token_id is {eos_setting!r}, and must be token ids{below}"
                )
        ids = {self.terminator, self.tokenizer.eos_token_id, *listed}
        return sorted(number for number in ids if number is not None)

    def _check_embedding(self, tokens: Mapping[int, Any]) -> None:
        """Refuse a special token without a row in the embedding, unless nothing writes it (Gemma 3 1B has one).

        Raises: ConfigError.
        """
        size = vocabulary_size(self.directory)
        if size is None:
            return
        text = "" if self.chat is None else self.chat.render([{"role": "user", "content": "text"}], True)
        beyond = [
            token.content
            for number, token in tokens.items()
            if number >= size and (number not in self.control_ids or token.content in text or number in self.stop_ids)
        ]
        if beyond:
            raise ConfigError(
                f"the tokenizer in {self.directory} has {len(self.tokenizer)} tokens, the model's embedding {size} "
                f"rows: {beyond[:3]} have none. Resize the embedding, or take the tokenizer that belongs to the model"
            )

    # ---- prompts

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation, ready for the response. Raises: ConfigError if the template refuses it."""
        messages = self.arranged(messages)
        contents = [message["content"] for message in messages]
        if self.chat is not None:
            return self.text.encode_written(lambda texts: self._render(messages, texts, True), contents)
        return [*self.opening, *self.text.encode_written(self._laid_out, contents)]

    def conversation(self, messages: Messages) -> list[int]:
        """Return the ids of a whole chat with its answers. Raises: ConfigError without a chat template."""
        if self.chat is None:
            raise ConfigError(f"a conversation needs a chat template, and {self.directory} is read as plain text")
        messages = self.arranged(messages)
        contents = [message["content"] for message in messages]
        return self.text.encode_written(lambda texts: self._render(messages, texts, False), contents)

    def plain(self, text: str) -> list[int]:
        """Ids of a text that begins a context: behind the tokenizer's own BOS, if it writes one."""
        return [*self._own_opening, *self.text.encode(text)]

    def _render(self, messages: Messages, texts: Sequence[str], add_generation_prompt: bool) -> str:
        assert self.chat is not None
        written = [Message(role=message["role"], content=text) for message, text in zip(messages, texts, strict=True)]
        return self.chat.render(written, add_generation_prompt)

    def _laid_out(self, texts: Sequence[str]) -> str:
        text = "\n".join(texts)
        layout = self.settings.template
        if isinstance(layout, PlainLayout):
            return layout.plain.replace(MARK, text)
        return text

    @cached_property
    def _own_opening(self) -> list[int]:
        """What the tokenizer puts before a text by itself, e.g. its BOS."""
        alone = list(self.tokenizer("a", add_special_tokens=False).input_ids)
        whole = list(self.tokenizer("a").input_ids)
        starts = [start for start in range(len(whole)) if whole[start : start + len(alone)] == alone]
        if starts:
            return whole[: starts[0]]
        return []

    @cached_property
    def opening(self) -> list[int]:
        """What stands before a plain prompt: the tokenizer's BOS, unless the layout writes it."""
        layout, opening = self.settings.template, self._own_opening
        written = (
            opening and isinstance(layout, PlainLayout) and layout.plain.startswith(self.tokenizer.decode(opening))
        )
        if written:
            return []
        return opening

    def arranged(self, messages: Messages) -> Messages:
        """Return the messages with system messages where the settings want them.

        Raises: ConfigError if the settings refuse any.
        """
        system = [message["content"] for message in messages if message["role"] == "system"]
        if not system:
            return messages
        if self.settings.system == "refuse":
            raise ConfigError(
                "there is a system message, and sampling.system is refuse: "
                "remove it, or set sampling.system to keep or fold"
            )
        if self.settings.system == "fold":
            return folded(messages)
        if self.chat is not None and not self.takes_system:
            raise ConfigError(
                f"there is a system message, and the chat template of {self.directory} has no place for it: "
                "set sampling.system to fold (it is put in front of the first user turn), or remove it"
            )
        return messages

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes system messages; plain text always does."""
        return self.chat is None or self.chat.takes_system()

    # ---- responses

    def response(self, text: str) -> list[int]:
        """Return the ids of a given, finished answer: its text's and the terminator, which is never doubled."""
        return [*self.text.encode(self.without_end(text)), self.terminator]

    def without_end(self, text: str) -> str:
        """The text without the stop tokens that it spells at its end, and the blanks around them."""
        while (bare := text.rstrip()) and (match := self._spelled_end.search(bare)):
            text = bare[: match.start()]
        return text

    @cached_property
    def _spelled_end(self) -> re.Pattern[str]:
        ends = self.tokenizer.convert_ids_to_tokens([number for number in self.stop_ids if number in self.control_ids])
        return re.compile(f"(?:{literals(ends).pattern})$")

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether a response ended by itself."""
        return bool(ids) and ids[-1] in self.stop_ids

    def read(self, ids: Sequence[int]) -> str:
        """The text of a response, without the token that ended it."""
        return self.tokenizer.decode(ids[:-1] if self.ended(ids) else ids, skip_special_tokens=False)

    def special_in(self, texts: Sequence[str | None]) -> str | None:
        """Return the first control token that one of the texts spells. A stop token at a text's end does not count."""
        spelled = (self.text.special(self.without_end(text)) for text in texts if text)
        return next((token for token in spelled if token), None)

    # ---- what others need to know

    @cached_property
    def known_ids(self) -> frozenset[int]:
        """Ids that a token has."""
        return frozenset(self.tokenizer.get_vocab().values()) | self.tokenizer.added_tokens_decoder.keys()

    @cached_property
    def blank_ids(self) -> list[int]:
        """Ids below the model's vocabulary size that no token has: the padding of its embedding. Never sampled."""
        size = vocabulary_size(self.directory)
        if size is None:
            return []
        return sorted(set(range(size)) - self.known_ids)

    def facts(self) -> dict[str, Any]:
        """What a record says of the token contract."""
        template = self.settings.template
        return {
            "tokenizer_digest": tokenizer_digest(self.directory),
            "template": template if isinstance(template, str) else next(iter(template.identity())),
            "template_digest": "" if self.chat is None else digest_text(self.chat.source),
            "terminator": self.tokenizer.convert_ids_to_tokens(self.terminator),
            "stop_ids": self.stop_ids,
        }


def unusable(row: Mapping[str, Any], settings: TurnConfig, turns: Turns) -> str | None:
    """Return why a row of prompts is dropped; None if it is used.

    Raises: ConfigError if the settings refuse such a row.
    """
    if settings.special_tokens_in_data == "text":
        return None
    texts = [message["content"] for message in row["messages"]]
    token = turns.special_in([*texts, *(row.get(name) for name in GIVEN_TEXTS)])
    if token is None:
        return None
    if settings.special_tokens_in_data == "refuse":
        raise ConfigError(
            f"the row {name_of(row)} spells the control token {token!r}: remove it, or set "
            "sampling.special_tokens_in_data to text (it is tokenised as text) or drop"
        )
    return DROPPED


def folded(messages: Messages) -> Messages:
    """Return the messages with all system texts in front of the first user turn, a blank line between."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [message for message in messages if message["role"] != "system"]
    for number, message in enumerate(rest):
        if message["role"] == "user":
            first = Message(role="user", content=f"{system}\n\n{message['content']}")
            return [*rest[:number], first, *rest[number + 1 :]]
    return [Message(role="user", content=system), *rest]


def turns_of_reader(directory: str | Path, settings: TurnConfig | None = None) -> Turns:
    """Return the turns of a model that reads what the policy reads: a teacher, a reward model.

    It reads by its own chat template, as plain text if it has none.

    `settings` are the policy's. Its template is not used, what it asks for (`template_kwargs`) is: a teacher of the
    same family must not begin to think where the policy does not, and other templates do not know the name.
    """
    base = (settings or TurnConfig()).model_copy(update={"template": "chat"})
    return with_room_for_system(turns_or_plain(directory, base))


def turns_or_plain(directory: str | Path, settings: TurnConfig) -> Turns:
    """Return the turns of a model; as plain text if its chat template is asked for and it has none."""
    tokenizer = load_tokenizer(directory)
    if settings.template == "chat" and not tokenizer.chat_template:
        settings = settings.model_copy(update={"template": "plain"})
    return Turns(directory, settings, tokenizer)


def with_room_for_system(turns: Turns) -> Turns:
    """Return the turns, changed to fold system messages if the template has no place for them."""
    if turns.settings.system == "keep" and not turns.takes_system:
        turns.settings = turns.settings.model_copy(update={"system": "fold"})
    return turns
