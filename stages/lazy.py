"""Stages - modules that load at first use, so that a config class can live beside the maths it configures.

A flow validates every setting of a run in a process that may have no torch at all.
"""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module until one of its attributes is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch = LazyModule("torch")
