"""Stages - samplers by name: what turns prompt ids into response ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.registry import Registry

if TYPE_CHECKING:
    from stages.sampling.base import Sampler

SAMPLERS: Registry[Sampler] = Registry(
    "samplers",
    {
        "vllm": "stages.sampling.vllm:VLLM",
        "transformers": "stages.sampling.transformers:Transformers",
        "canned": "stages.sampling.canned:Canned",
    },
)
