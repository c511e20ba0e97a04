"""Random models of known shapes, and what a pass over them costs: for benchmarks.gpu_check, which downloads nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.forecast.memory import Shape, shape_of

ROOT = Path(__file__).resolve().parents[1]


class ModelKind(NamedTuple):
    """A model to be made: its architecture, and how coarsely its tokenizer cuts."""

    type: str
    tokens: int
    """Entries of the tokenizer that encoding reaches; other numbers cut the same text elsewhere."""
    size: dict[str, Any]


def _size(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


KINDS = {
    "135m": ModelKind("llama", 2000, _size(576, 1536, 30, 9, 3, 49_152, True)),
    "1.8b": ModelKind("qwen2", 4000, _size(2048, 5504, 24, 16, 16, 151_936, False)),
    "7b": ModelKind("mistral", 3000, _size(4096, 14_336, 32, 32, 8, 32_000, False)),
}
"""SmolLM2-135M; Qwen1.5-1.8B, SWIFT's student; Zephyr-7B, its teacher."""
SMOKE = {
    "135m": ModelKind("llama", 400, _size(64, 96, 2, 4, 2, 512, True)),
    "1.8b": ModelKind("qwen2", 450, _size(64, 96, 2, 4, 4, 640, False)),
    "7b": ModelKind("mistral", 350, _size(64, 128, 2, 4, 2, 512, False)),
}


def kind_of(name: str, smoke: bool) -> ModelKind:
    """The model to be made under a name; a smoke run makes a tiny one of the same architecture."""
    return (SMOKE if smoke else KINDS)[name]


def shape_of_kind(kind: ModelKind) -> Shape:
    """Its shape, as `selfplay plan` knows it."""
    return shape_of(kind.size)


def model_directory(work: Path, name: str, smoke: bool, device: str) -> str:
    """The directory of a random bf16 model below `work`; made on the device at the first call."""
    directory = work / "models" / name
    if directory.is_dir():
        return str(directory)
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

    kind = kind_of(name, smoke)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind.type](**kind.size))
    finally:
        torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    unfinished = directory.with_name(f"{name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    _write_tokenizer(unfinished, kind)
    os.replace(unfinished, directory)
    return str(directory)


def _write_tokenizer(directory: Path, kind: ModelKind) -> None:
    """A byte-level BPE of the quickstart's prompts; ids beyond its entries are words of their own, so that a sampler may
    draw any id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.tokens,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for number in range(len(vocabulary), kind.size["vocab_size"]):
        vocabulary[f"Ġfiller{number}"] = number
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(directory)


def texts() -> list[str]:
    """The quickstart's prompts."""
    lines = (ROOT / "deploy" / "prompts" / "quickstart_train.jsonl").read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def random_text(chance: random.Random, words: int) -> str:
    """Words of the quickstart's prompts, in any order."""
    source = " ".join(texts()).split()
    return " ".join(chance.choice(source) for _ in range(words))


def model_flops(shape: Shape, tokens: int, scored: int, lengths: Sequence[int], passes: int) -> float:
    """Floating-point operations of a pass over packed rows, whatever the implementation does.

    tokens: all that go through the layers, a shared prompt once; scored: those whose logits are needed; lengths: of
    each prompt with its response, for causal attention (half of its square). passes: 1 forward, 3 with backward.
    """
    width = shape.heads * shape.head_dim
    layer = 2 * shape.hidden * (width + shape.kv_width) + 3 * shape.hidden * shape.intermediate
    attention = sum(2 * length**2 * width for length in lengths) * shape.layers
    return passes * (2 * tokens * shape.layers * layer + 2 * scored * shape.hidden * shape.vocabulary + attention)
