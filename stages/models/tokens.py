"""Stages - the token contract: how text becomes ids, once, and how that is written down.

Prompt and response are tokenised apart and concatenated, so the seam lies at the same token in every model and every pass. A response
carries an EOS only if it really ended; from the sampler to the loss it travels as ids and is never decoded and encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from data_contracts.errors import ConfigError
from data_contracts.identity import digest_file, digest_text
from stages.running.cost import loading

Template = Literal["chat", "plain"]


def load_tokenizer(directory: str | Path) -> Any:
    """Raises: ConfigError if it cannot be loaded. Code that comes with a model is never run."""
    with loading():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            said = (str(error) or type(error).__name__).partition("\n")[0]
            raise ConfigError(
                f"the tokenizer in {directory} cannot be loaded ({type(error).__name__}: {said:.300}): fetch the model again"
            ) from error


def encode_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], template: Template) -> list[int]:
    """Token ids of a prompt, ready for the response to follow.

    chat: the model's chat template with its generation prompt; plain: the messages' text, with the tokenizer's own BOS if it adds one.
    The template writes its special tokens itself; adding the tokenizer's on top would double the BOS.
    """
    if template == "plain":
        return list(tokenizer("\n".join(message["content"] for message in messages)).input_ids)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a response that ended: the text's own, then EOS."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token: a finished response cannot be told from a cut one")
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def context_length(directory: str | Path) -> int | None:
    """Positions the model was built for, from config.json; None if it does not say."""
    config = json.loads((Path(directory) / "config.json").read_text())
    text = config.get("text_config", config)
    return text.get("max_position_embeddings") or text.get("n_positions")


def stop_ids(directory: str | Path, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's EOS and the ones of generation_config.json."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    path = Path(directory) / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text()).get("eos_token_id")
        ids |= set(named if isinstance(named, list) else [named]) - {None}
    return sorted(ids)


def tokenizer_digest(directory: str | Path) -> str:
    """What its tokens are made of: equal for two models exactly if they cut text alike."""
    path = Path(directory) / "tokenizer.json"
    if path.is_file():
        return digest_file(path)
    return digest_text(json.dumps(sorted(load_tokenizer(directory).get_vocab().items())))


def token_facts(directory: str | Path, tokenizer: Any, template: Template) -> dict[str, str]:
    """What a record says of the token contract: digests of tokenizer and template, and the template's name."""
    return {
        "tokenizer_digest": tokenizer_digest(directory),
        "template": template,
        "template_digest": digest_text(tokenizer.chat_template or "") if template == "chat" else "",
    }
