"""Stages - samplers by name: what turns prompt ids into response ids."""

from stages.registry import Registry

SAMPLERS = Registry(
    "samplers",
    {
        "vllm": "stages.sampling.vllm:VLLM",
        "transformers": "stages.sampling.transformers:Transformers",
        "canned": "stages.sampling.canned:Canned",
    },
)
