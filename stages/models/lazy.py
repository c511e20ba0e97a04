"""Stages - modules that load at first use, so that a config class can live beside the maths that it configures.

A flow validates every setting of a run, and its process may have no torch at all.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.running.cost import loading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


class LazyModule:
    """Stand-in for a module; reading its first attribute imports the module."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            with loading():
                importlib.import_module(self._name)
        return getattr(sys.modules[self._name], attribute)


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """What is imported inside finds these packages not installed. A package that is in memory already stays."""
    hidden: dict[str, Any] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_transformers() -> ModuleType:
    """Return transformers, which takes scipy and scikit-learn to be absent unless it looked for them before.

    Where they are installed it imports both with every model, for assisted generation and for losses of object
    detection: a quarter of the processor time of a stage's start (1.7 of 6.9 s), for what no stage uses.
    """
    with loading(), absent("scipy", "sklearn"):
        transformers = importlib.import_module("transformers")
        transformers.utils.is_scipy_available()  # remembers its answer
        transformers.utils.is_sklearn_available()
    return transformers


def import_auto_classes() -> None:
    """Import what transformers needs to load a model or a tokenizer of any family."""
    import_transformers()
    with loading():
        from transformers import (  # noqa: F401
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )


def import_model_class(directory: str) -> None:
    """Import the class of a causal language model's own type, and have transformers compile its names of tensors.

    Both are most of what loading a small model takes. Raises: what transformers raises for a directory that holds no
    model of a type that it knows.
    """
    import_auto_classes()
    with loading():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        get_checkpoint_conversion_mapping(config.model_type)


if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")
