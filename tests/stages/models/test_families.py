"""Every family that vLLM and transformers both serve: our log-probs and gradients are those of its own eager attention.

Strategy: a small random model of each family in float32, loaded as the stages load it. The reference is transformers'
`eager`, one sequence at a time, without padding; ours are padded batches, and packed ones where the family packs.
`python tests/stages/models/test_families.py` writes the table of docs/models.md.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from data_contracts.artifact import ArtifactRef
from stages.models.families import attention_addition, attention_of
from stages.models.packing import pack, packable
from stages.models.policy import collate, load_causal_lm, response_logps

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
GPT2 = {
    "vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
NO_GROUPS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
FALCON = {name: value for name, value in NO_GROUPS.items() if name != "intermediate_size"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
QWEN_MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRANITE = {
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
}
GPT_OSS = {"head_dim": 16, "sliding_window": 6, "rope_parameters": None}
FAMILIES = {
    ("llama", ""): SIZES,
    ("mistral", ""): SIZES | {"sliding_window": None},
    ("mistral", "sliding window"): SIZES | {"sliding_window": 6},
    ("mixtral", ""): SIZES | EXPERTS | {"sliding_window": None},
    ("qwen2", ""): SIZES,
    ("qwen2", "sliding window"): SIZES | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ("qwen3", ""): SIZES | {"head_dim": 16},
    ("qwen3_moe", ""): SIZES | QWEN_MOE,
    ("gemma", ""): SIZES | {"head_dim": 16},
    ("gemma2", "capped attention"): SIZES | GEMMA | {"attn_logit_softcapping": 1.0},
    ("gemma3_text", "sliding window"): SIZES | GEMMA | TWO_KINDS,
    ("phi3", ""): SIZES,
    ("phi3", "sliding window"): SIZES | {"sliding_window": 6},
    ("olmo2", ""): SIZES,
    ("gpt2", ""): GPT2,
    ("gpt_neox", ""): NO_GROUPS,
    ("smollm3", ""): SIZES,
    ("granite", ""): SIZES | GRANITE,
    ("stablelm", ""): SIZES,
    ("falcon", ""): FALCON | {"multi_query": True},
    ("falcon", "ALiBi"): FALCON | {"alibi": True, "multi_query": False},
    ("falcon", "grouped queries"): FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ("gpt_oss", "attention sinks"): SIZES | GPT_OSS | EXPERTS | TWO_KINDS,
}
TOLERANCE = 1e-5


def build(family: str, settings: dict, directory: Path) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).save_pretrained(directory)
    return directory


def texts() -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    """Two responses to each of five prompts, a third one to the first; and a factor for each token's log-prob."""
    draw = random.Random(0)

    def ids(most: int) -> list[int]:
        return [draw.randrange(5, 300) for _ in range(draw.randint(1, most))]

    prompts = [ids(14) for _ in range(5)]
    prompts = [*prompts, *prompts, prompts[0]]
    responses = [ids(9) for _ in prompts]
    generator = torch.Generator().manual_seed(0)
    return prompts, responses, [torch.rand(len(response), generator=generator) for response in responses]


def flat_gradient(model) -> torch.Tensor:
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def ours(model, batch, factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all response tokens, and the gradient of their weighted sum by every weight."""
    model.zero_grad()
    logps = response_logps(model, batch)[batch.response_mask]
    (logps * torch.cat(factors)).sum().backward()
    return logps.detach(), flat_gradient(model)


def eager(directory: Path, prompts, responses, factors) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from transformers' eager attention, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    logps = []
    for prompt, response, factor in zip(prompts, responses, factors, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
        row = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        (row * factor).sum().backward()
        logps.append(row.detach())
    return torch.cat(logps), flat_gradient(model)


def measure(family: str, settings: dict, directory: Path) -> tuple[str, dict[str, float]]:
    """The attention that the stages take, and the largest error of padded and packed batches, relative or in nats."""
    build(family, settings, directory)
    prompts, responses, factors = texts()
    model = load_causal_lm(str(directory), "float32", "cpu").eval()
    expected = eager(directory, prompts, responses, factors)
    assert expected[0].std() > 0.1 and expected[1].norm() > 1  # the loss has something to do with the model
    batches = {"padded": collate(prompts, responses)}
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    if packable(model, longest):
        batches["packed"] = pack(prompts, responses)
    errors = {}
    for name, batch in batches.items():
        logps, gradient = ours(model, batch, factors)
        relative = float((gradient - expected[1]).norm() / expected[1].norm())
        errors[name] = max(float((logps - expected[0]).abs().max()), relative)
    return model.config._attn_implementation, errors


def row_of(family: str, variant: str, settings: dict, directory: Path) -> str:
    """The family's line in docs/models.md."""
    attention, errors = measure(family, settings, directory)
    agrees = "yes" if max(errors.values()) <= TOLERANCE else "NO"
    name = f"`{family}`" + (f", {variant}" if variant else "")
    attention = "eager" if attention == "eager" else "sdpa"
    return f"| {name} | {attention} | {'yes' if 'packed' in errors else 'padded'} | {agrees} |"


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_models_own_attention(family, variant, tmp_path):
    row = row_of(family, variant, FAMILIES[family, variant], tmp_path)
    assert row.endswith("| yes |")
    assert row in PAGE.read_text().splitlines(), (
        "write docs/models.md again: python tests/stages/models/test_families.py"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "gemma2"}, "eager"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None}, None),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "eager"),
        ({"model_type": "gemma3", "text_config": {"attn_logit_softcapping": None}}, None),
        ({"model_type": "gemma3", "text_config": {"attn_logit_softcapping": 5}}, "eager"),
        ({"model_type": "falcon", "alibi": True}, "eager"),
        ({"model_type": "falcon", "alibi": False}, None),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_the_attention_follows_from_the_config(settings, expected):
    assert attention_of(settings) == expected


def test_a_key_changes_only_for_a_model_with_another_attention(tmp_path, tiny_model):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))

    def ref(path, kind="checkpoint") -> ArtifactRef:
        return ArtifactRef(kind=kind, key="external", path=str(path), content="c")

    assert attention_addition([ref(tmp_path), ref(tiny_model)]) == {"attention": "eager"}
    assert attention_addition([ref(tiny_model), ref(tmp_path, "prompts"), ref("/nowhere")]) == {}


HEAD = """# Models

Which model families were held against their own code: a small random model of each, in float32, log-probs and the
gradients of all weights, one sequence at a time under transformers' `eager` attention against our batches. The table
is written by `python tests/stages/models/test_families.py`, and a test keeps it true.

*attention*: what training and log-prob passes run with. `sdpa` is torch's fused kernel; `eager` is taken where that one
drops something (a cap on the attention's logits, ALiBi, sinks). *packed*: batches without padding, each prompt once
for all its responses; the others are padded. *agrees*: to 1e-5, padded and packed.

| family (`model_type`) | attention | packed | agrees with its own code |
|---|---|---|---|
"""


def write_page() -> None:
    rows = []
    for (family, variant), settings in FAMILIES.items():
        with tempfile.TemporaryDirectory() as directory:
            rows.append(row_of(family, variant, settings, Path(directory)))
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    sys.exit(write_page())
