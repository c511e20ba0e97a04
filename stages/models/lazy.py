"""Stages - modules that load at first use, so that a config class can live beside the maths that it configures.

A flow validates every setting of a run, and its process may have no torch at all.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from stages.running.cost import loading


class LazyModule:
    """Stand-in for a module; reading its first attribute imports the module."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if self._name not in sys.modules:
            with loading():
                importlib.import_module(self._name)
        return getattr(sys.modules[self._name], attribute)


if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")
