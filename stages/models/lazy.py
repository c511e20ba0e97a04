"""Stages - modules that load at first use, so that a config class can live beside the maths it configures.

A flow validates every setting of a run in a process that may have no torch at all.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from stages.running.cost import loading


class LazyModule:
    """Stands for a module until one of its attributes is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            with loading():
                importlib.import_module(self._name)
        return getattr(sys.modules[self._name], attribute)


torch = LazyModule("torch")
