"""Stages - how much memory a model needs, on paper: parameters, gradients, optimizer, activations, logits, KV cache.

Bytes per rank.

P parameters, N ranks, L layers, H hidden size, I width of the MLP, V vocabulary, T tokens of a micro-batch, R
response tokens among them. The weights are counted from the files' headers, activations by a formula that a test
holds against what torch really keeps for the backward pass; packing rows and computing logits in pieces need less
than is said here. What an allocator loses to fragments is in SLACK: a plan that fits by less than a tenth has to be
tried.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.adapter import is_bare_adapter, named_base
from data_contracts.checkpoint import ModelRef
from data_contracts.errors import ConfigError
from stages.running.cost import parameters
from stages.training.config import AdapterConfig, TrainingConfig

GIB = 2**30
RESERVED = int(1.5 * GIB)
"""On each GPU, for the CUDA context, NCCL's buffers and libraries' workspaces."""
SLACK = 0.05
"""Part of the rest that an allocator loses to fragments."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: with an 8-bit scale for 64 of them, and a float32 one for 256 scales."""
STATES = {"rmsprop": 4, "adamw": 8}
"""Optimizer state per parameter, float32."""
LOGITS_FORWARD = 2 + 4 + 4
"""Bytes per response token and vocabulary entry of a pass: the model's bf16, its float32 copy, and the exponentials
of the log-sum.
"""
LOGITS_BACKWARD = 2 + 4 + 4 + 4
"""The same with gradients: bf16, float32, the gradient of the log-sum and of the gather."""


class Shape(NamedTuple):
    """What memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


# From the config.json of each model; so that a plan can be made before anything is fetched.
KNOWN = {
    "Qwen/Qwen1.5-1.8B": Shape(1_836_828_672, 24, 2048, 5504, 16, 16, 128, 151_936, 32_768),
    "alignment-handbook/zephyr-7b-sft-full": Shape(7_241_732_096, 32, 4096, 14_336, 32, 8, 128, 32_000, 32_768),
    "mistralai/Mistral-7B-Instruct-v0.2": Shape(7_241_732_096, 32, 4096, 14_336, 32, 8, 128, 32_000, 32_768),
    "meta-llama/Meta-Llama-3-8B-Instruct": Shape(8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, 8192),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3_212_749_824, 28, 3072, 8192, 24, 8, 128, 128_256, 131_072),
    "openai-community/gpt2-xl": Shape(1_557_611_200, 48, 1600, 6400, 25, 25, 64, 50_257, 1024),
    "Qwen/Qwen2.5-7B-Instruct": Shape(7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064, 32_768),
    "llm-blender/PairRM-hf": Shape(434_000_000, 24, 1024, 4096, 16, 16, 64, 128_100, 2048),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": Shape(7_511_000_000, 32, 4096, 14_336, 32, 8, 128, 128_256, 8192),
}


def model_shape(model: ModelRef | Path | str) -> Shape:
    """The shape of a model directory, of a hub model in the local cache, or of one in KNOWN.

    Nothing is fetched, no tensor is read.

    Raises: ConfigError if the model is none of them.
    """
    if isinstance(model, ModelRef):
        if model.path is None:
            cached = _cached(model)
            if cached is None and model.hub_id in KNOWN:
                return KNOWN[model.hub_id]
            if cached is None:
                raise ConfigError(
                    f"the model {model.hub_id} is neither in the local cache nor among those whose size is known "
                    f"({', '.join(sorted(KNOWN))}): fetch it, or give `path:` of a directory"
                )
            return model_shape(cached)
        model = Path(model.path).expanduser()
    directory = Path(model)
    if is_bare_adapter(directory) and (base := named_base(directory)):
        return model_shape(base.path or ModelRef(hub_id=base.hub_id, revision=base.revision))
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}/config.json cannot be read: {error}") from None
    return shape_of(config, parameters(str(directory)) or None, str(directory))


def _cached(model: ModelRef) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if model.hub_id is None:
        return None
    path = try_to_load_from_cache(model.hub_id, "config.json", revision=model.revision)
    if isinstance(path, str):
        return Path(path).parent
    return None


def shape_of(config: dict[str, Any], counted: int | None = None, where: str = "config.json") -> Shape:
    """From a config.json; the number of parameters by the architecture's formula unless it was counted.

    Raises: ConfigError.
    """

    def first(*names: str, default: Any = None) -> int:
        value = next((config[name] for name in names if config.get(name) is not None), default)
        if value is None:
            raise ConfigError(
                f"{where} has none of {', '.join(names)}: the memory of this architecture cannot be planned"
            )
        return int(value)

    hidden, layers, heads = (
        first("hidden_size", "n_embd", "d_model"),
        first("num_hidden_layers", "n_layer"),
        first("num_attention_heads", "n_head"),
    )
    intermediate = first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    kv_heads, head_dim = first("num_key_value_heads", default=heads), first("head_dim", default=hidden // heads)
    vocabulary, context = first("vocab_size"), first("max_position_embeddings", "n_positions", "n_ctx")
    if counted is None:
        gated = "n_embd" not in config
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
        layer = attention + (3 if gated else 2) * hidden * intermediate + 2 * hidden
        tied = config.get("tie_word_embeddings", not gated)
        embeddings = (1 if tied else 2) * vocabulary * hidden
        positions = 0 if gated else context * hidden
        counted = int(layers * layer + embeddings + positions + hidden)
    return Shape(counted, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context)


def layer_activations(shape: Shape, length: int) -> int:
    """Bytes per token that one layer keeps for the backward pass in bf16, in rows of `length` tokens.

    20 H: two norms with float32 copies, q, the attention's output, residuals; 4 bytes per k and v; 8 I: gate, up,
    their product, and the activation; 2 S: the mask in bf16. Attention itself keeps its output only (SDPA).
    """
    return 20 * shape.hidden + 4 * shape.kv_width + 8 * shape.intermediate + 2 * length


def adapter_activations(shape: Shape, rank: int) -> int:
    """Bytes per token that one layer keeps more with an adapter in all of its linear layers.

    4 (6 H + I): the factors' inputs in float32, one copy for each of q, k, v, o, gate, up and down; 28 r: their
    products with A; less 8 H + 2 I that frozen norms and weights need not keep.
    """
    return 16 * shape.hidden + 2 * shape.intermediate + 28 * rank


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of a layer's linear layers, by the names that Llama-like models have."""
    hidden, heads = shape.hidden, shape.heads * shape.head_dim
    return {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, shape.kv_width),
        "v_proj": (hidden, shape.kv_width),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, shape.intermediate),
        "up_proj": (hidden, shape.intermediate),
        "down_proj": (shape.intermediate, hidden),
    }


def adapter_parameters(shape: Shape, adapter: AdapterConfig) -> int:
    """Return the number of trained parameters, r (inputs + outputs) for each layer; of all layers where a target's name
    is none of Llama's."""
    sizes = linear_sizes(shape)
    targets = {target.rpartition(".")[2] for target in adapter.targets} if adapter.targets != "auto" else set(sizes)
    if not targets <= sizes.keys():
        targets = set(sizes)
    return shape.layers * adapter.rank * sum(sum(sizes[name]) for name in targets)


def frozen_weights(shape: Shape, adapter: AdapterConfig, width: int) -> int:
    """Return the bytes of the frozen weights: as they are, or NF4 but for embeddings, head and norms."""
    if adapter.name == "lora":
        return width * shape.parameters
    quantised = shape.layers * sum(inputs * outputs for inputs, outputs in linear_sizes(shape).values())
    quantised = min(quantised, shape.parameters)
    return int(NF4 * quantised) + width * (shape.parameters - quantised)


def adapter_memory(
    shape: Shape, config: TrainingConfig, rows: Rows, ranks: int, ranks_per_node: int, others: tuple[Shape, ...] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """The same as `training_memory` for a training of an adapter: float32 factors, their gradient and state.

    A reference in memory is the same model: it costs its logits alone, which `others` has with no parameters.
    """
    runtime, width, adapter = config.runtime, BYTES[config.dtype], config.adapter
    assert adapter is not None
    trained, stage = adapter_parameters(shape, adapter), runtime.zero_stage
    cut = [ranks if stage >= level else 1 for level in range(3)]
    state = (STATES[config.optimizer] + 4 * (stage > 0)) * trained // cut[1]  # ZeRO keeps a copy of its part
    offloaded = state if runtime.offload_optimizer and stage else 0
    kept = activations(shape, rows.tokens, rows.length, runtime.gradient_checkpointing, adapter.rank)
    device = {
        "frozen weights": frozen_weights(shape, adapter, width),
        "adapter": 4 * trained,
        "gradients": 4 * trained // cut[2],
        "optimizer": state - offloaded,
        "activations": kept * width // 2,
        "logits": rows.responses * shape.vocabulary * LOGITS_BACKWARD,
        "other models": sum(
            width * other.parameters + rows.responses * other.vocabulary * LOGITS_FORWARD for other in others
        ),
    }
    if adapter.name == "qlora":  # a layer's weights in training.dtype, while it is computed
        device["dequantised"] = width * max(inputs * outputs for inputs, outputs in linear_sizes(shape).values())
    host = {"offloaded optimizer": ranks_per_node * offloaded}
    if adapter.save_merged:
        host["merge"] = (4 if config.save_dtype == "float32" else 6) * shape.parameters
    return device, host


def activations(shape: Shape, tokens: int, length: int, checkpointing: bool, adapter_rank: int = 0) -> int:
    """Bytes that a forward of `tokens` keeps: every layer, or every layer's input and one layer at a time."""
    per_layer = layer_activations(shape, length)
    if adapter_rank:
        per_layer += adapter_activations(shape, adapter_rank)
    stored = shape.layers * 2 * shape.hidden + per_layer if checkpointing else shape.layers * per_layer
    return tokens * (stored + 7 * shape.hidden)


def kv_cache_per_token(shape: Shape, ranks: int = 1) -> int:
    """Bytes of keys and values per token in bf16, on one of `ranks` tensor-parallel GPUs."""
    return 2 * shape.layers * -(-shape.kv_heads // ranks) * shape.head_dim * 2


class Rows(NamedTuple):
    """How large a micro-batch is."""

    tokens: int
    """Padded tokens at once: the budget, or one row where that is more."""
    length: int
    """Of one sequence."""
    response: int
    """Tokens of a sequence that are scored; logits exist for these alone."""

    @property
    def responses(self) -> int:
        return self.tokens * self.response // self.length


def rows_of(budget: int, prompt: int, response: int, sides: int) -> Rows:
    """The largest micro-batch under a token budget: a row is never cut, however small the budget."""
    return Rows(max(budget, sides * (prompt + response)), prompt + response, response)


def training_memory(
    shape: Shape, config: TrainingConfig, rows: Rows, ranks: int, ranks_per_node: int, others: tuple[Shape, ...] = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes on each GPU, bytes of host memory per node) of DeepSpeed training under a `TrainingConfig`; `others`
    stay in memory beside it.

    bf16 keeps float32 master weights. ZeRO 1 cuts the optimizer over the ranks, 2 the gradients too, 3 the weights too;
    under ZeRO, bf16 gradients add up in float32 (under ZeRO 1 beside the model's own, whole on each rank).
    """
    if config.adapter is not None:
        return adapter_memory(shape, config, rows, ranks, ranks_per_node, others)
    runtime, weights, width = config.runtime, shape.parameters, BYTES[config.dtype]
    mixed, stage = config.dtype == "bfloat16", config.runtime.zero_stage
    cut = [ranks if stage >= level else 1 for level in range(4)]
    gradient_bytes = width
    if stage == 1:
        gradient_bytes = width + 4 * mixed
    elif stage > 1:
        gradient_bytes = 4
    state = (
        (4 * mixed + STATES[config.optimizer] + 4 * mixed) * weights // cut[1]
    )  # masters, moments, and the gradient in float32
    offloaded = state if runtime.offload_optimizer and stage else 0
    device = {
        "weights": width * weights // cut[3],
        "gradients": gradient_bytes * weights // cut[2],
        "optimizer": state - offloaded,
        "activations": activations(shape, rows.tokens, rows.length, runtime.gradient_checkpointing) * width // 2,
        "logits": rows.responses * shape.vocabulary * LOGITS_BACKWARD,
        "other models": sum(
            width * other.parameters + rows.responses * other.vocabulary * LOGITS_FORWARD for other in others
        ),
    }
    # Loading needs no more than this: weights go to the device in the training's dtype, under ZeRO 3 cut up module by
    # module, and the float32 masters are read tensor by tensor from mapped files, whose pages the ranks share.
    return device, {"offloaded optimizer": ranks_per_node * offloaded}


def pass_memory(shape: Shape, dtype: str, rows: Rows) -> dict[str, int]:
    """Return bytes on the GPU of a forward pass without gradients: one layer's activations at a time.

    The weigh and evaluate stages and reward models make such passes.
    """
    return {
        "weights": BYTES[dtype] * shape.parameters,
        "activations": rows.tokens * (layer_activations(shape, rows.length) + 4 * shape.hidden) * BYTES[dtype] // 2,
        "logits": rows.responses * shape.vocabulary * LOGITS_FORWARD,
    }


def scorer_memory(scorer: Any, shape: Shape, rows: Rows, on_gpu: bool) -> dict[str, int]:
    """Bytes of a scorer's network; PairRM's also makes the scores of positions, which no fused attention covers."""
    dtype = getattr(scorer, "dtype", "float32")
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    parts = pass_memory(shape, dtype, rows._replace(response=0))
    if scorer.name != "pairrm" or not on_gpu:
        return parts
    # Two products with the positions, their cells, and the sum: four numbers per head, query and key. A row holds the
    # prompt and two answers.
    length = min(shape.context, rows.length + rows.response)
    return parts | {"position scores": 4 * BYTES[dtype] * rows.tokens * length * shape.heads}


def vllm_memory(shape: Shape, context: int, ranks: int, sequences: int) -> dict[str, int]:
    """Return bytes that vLLM needs on each of `ranks` tensor-parallel GPUs.

    Weights, its profiling run, and a cache for `sequences`.
    """
    profile = (
        max(8192, context) * (2 * shape.intermediate + 8 * shape.hidden) * 2 // ranks
        + 256 * shape.vocabulary * LOGITS_FORWARD
    )
    return {
        "weights": 2 * shape.parameters // ranks,
        "activations": profile,
        "kv cache": sequences * context * kv_cache_per_token(shape, ranks),
    }


def generate_memory(shape: Shape, dtype: str, context: int, sequences: int) -> dict[str, int]:
    """Bytes of plain decoding of `sequences` at once."""
    return {
        "weights": BYTES[dtype] * shape.parameters,
        "kv cache": sequences * context * kv_cache_per_token(shape) * BYTES[dtype] // 2,
        "logits": sequences * shape.vocabulary * 3 * 4,
        "activations": sequences * context * layer_activations(shape, context) * BYTES[dtype] // 2,
    }


def with_slack(parts: dict[str, int]) -> int:
    """What a GPU must have for these parts."""
    return int(sum(parts.values()) * (1 + SLACK)) + RESERVED
