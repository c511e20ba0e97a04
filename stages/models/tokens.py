"""Stages - a model's tokenizer, as its tokenizer.json has it, and what its files say of lengths and digests.

How conversations become ids, and what ends a response: stages/models/turns.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError
from data_contracts.identity import digest_file, digest_text
from stages.models.lazy import import_transformers
from stages.running.cost import loading

SAMPLES = (
    "We need to add 9 and 6.",
    "  Two spaces in front,  two inside, a tab\tand two lines.\n\nGood.",
    "Größe, 你好, λ 🦊 - naïve café?",
    "def f(x):\n    return x[0] != -1  # it's 3.14",
)
"""Texts that a loaded tokenizer must cut, and put together again, as its tokenizer.json does."""


def load_tokenizer(directory: str | Path) -> Any:
    """Return the tokenizer of a model directory. It cuts text as tokenizer.json does; the model's own code never runs.

    transformers rebuilds some tokenizers by the name of their class, and a byte-level one that calls itself a Llama
    tokenizer loses its spaces: where the two disagree, the file itself is loaded.
    Raises: ConfigError if it cannot be loaded.
    """
    path = Path(directory) / "tokenizer.json"
    transformers = import_transformers()
    with loading():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            if path.is_file():
                status = path.stat()
                if not _is_as_file(tokenizer, path, (status.st_ino, status.st_mtime_ns, status.st_size)):
                    tokenizer = _from_file(tokenizer, path)
        except ConfigError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            message = (str(error) or type(error).__name__).partition("\n")[0]
            raise ConfigError(
                f"the tokenizer in {directory} cannot be loaded ({type(error).__name__}: {message:.300}): "
                "fetch the model again"
            ) from error
    text = SAMPLES[0]
    again = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=False)
    if again.split() != text.split() and "".join(again.split()) == "".join(text.split()):
        raise ConfigError(
            f"the tokenizer in {directory} loses spaces: {text!r} comes back as {again!r}. "
            "Fetch the tokenizer files of the model again"
        )
    return tokenizer


_VERDICTS: dict[tuple[str, tuple[int, int, int]], bool] = {}


def _is_as_file(tokenizer: Any, path: Path, version: tuple[int, int, int]) -> bool:
    """Return whether the tokenizer cuts and decodes `SAMPLES` as its file does.

    The answer is cached: reading a large file takes seconds.
    """
    key = (str(path), version)
    if key not in _VERDICTS:
        from tokenizers import Tokenizer

        _VERDICTS[key] = _agree(tokenizer, Tokenizer.from_file(str(path)))
    return _VERDICTS[key]


def _agree(tokenizer: Any, backend: Any) -> bool:
    for text in SAMPLES:
        ids = backend.encode(text, add_special_tokens=False).ids
        if list(tokenizer(text, add_special_tokens=False).input_ids) != ids:
            return False
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded != backend.decode(ids, skip_special_tokens=False):
            return False
    return True


def _from_file(tokenizer: Any, path: Path) -> Any:
    """A tokenizer made of the file alone, with the special tokens, template and limits that `tokenizer` was given.

    Raises: ConfigError if even that one cuts text in another way.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(path))
    exact = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        name_or_path=tokenizer.name_or_path,
        **tokenizer.special_tokens_map,
    )
    exact.chat_template = tokenizer.chat_template
    if not _agree(exact, backend):
        raise ConfigError(
            f"transformers cuts text otherwise than {path} says, and so does the file loaded by itself: "
            "the ids would be of other tokens than the model was trained on. "
            "Fetch the tokenizer files again, or save them anew with the library that made the model"
        )
    return exact


def context_length(directory: str | Path) -> int | None:
    """Positions the model was built for, from config.json; None if it does not say."""
    config = json.loads((Path(directory) / "config.json").read_text())
    text = config.get("text_config", config)
    return text.get("max_position_embeddings") or text.get("n_positions")


def vocabulary_size(directory: str | Path) -> int | None:
    """Return the number of rows of the model's embedding, from config.json; None if it is not there.

    Often more than the tokenizer has tokens: the rest is padding.
    """
    try:
        config = json.loads((Path(directory) / "config.json").read_text())
    except OSError:
        return None
    size = config.get("text_config", config).get("vocab_size")
    if isinstance(size, int):
        return size
    return None


def tokenizer_digest(directory: str | Path) -> str:
    """What its tokens are made of: equal for two models exactly if they cut text alike."""
    path = Path(directory) / "tokenizer.json"
    if path.is_file():
        return digest_file(path)
    return digest_text(json.dumps(sorted(load_tokenizer(directory).get_vocab().items())))
