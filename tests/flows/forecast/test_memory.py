"""Memory on paper: counts against published totals, activations against what torch really keeps, plans that refuse and help.

Strategy: the counting formula reproduces the parameter totals of seven published models from their config.json fields; the activation
formula is held against saved_tensors_hooks on small random models; every knob that a plan recommends is applied and must then fit.
"""

import re

import pytest

from data_contracts.checkpoint import ModelRef
from data_contracts.errors import ConfigError
from flows.config import load_run, parse_assignment
from flows.forecast.memory import (
    GIB,
    KNOWN,
    Shape,
    activations,
    adapter_parameters,
    kv_cache_per_token,
    model_shape,
    rows_of,
    shape_of,
)
from flows.forecast.plan import hardware, main, plan, refuse_what_cannot_fit, stage_memory
from stages.models.adapters import add_adapter, trainable
from stages.models.policy import load_causal_lm
from stages.training.adapter import lora_config
from stages.training.config import AdapterConfig

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        (
            LLAMA | {"vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False},
            7_241_732_096,
        ),  # Mistral-7B
        (
            LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False},
            8_030_261_248,
        ),  # Llama-3-8B
        (
            {
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 28,
                "num_attention_heads": 24,
                "num_key_value_heads": 8,
            }
            | {"head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": True},
            3_212_749_824,  # Llama-3.2-3B
        ),
    ],
)
def test_parameters_follow_from_the_config_file(fields, total):
    assert shape_of(fields).parameters == total


@pytest.mark.parametrize(
    ("checkpointing", "kind", "rank"),
    [
        (False, "llama", 0),
        (True, "llama", 0),
        (False, "gpt2", 0),
        (False, "llama", 4),
        (False, "llama", 32),
    ],
)
def test_activations_are_what_torch_keeps_for_the_backward_pass(checkpointing, kind, rank):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    length, rows = 128, 2
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=320, hidden_size=256, intermediate_size=896, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
            max_position_embeddings=256,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    else:
        config = GPT2Config(
            vocab_size=320, n_embd=256, n_layer=3, n_head=4, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        model = GPT2LMHeadModel(config).to(torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if rank:
        add_adapter(model.requires_grad_(False), lora_config(AdapterConfig(rank=rank)))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(5, 300, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    measured = sum(size for size, _ in kept.values())
    shape = shape_of(config.to_dict(), 0)
    expected = activations(shape, rows * length, length, checkpointing, rank)
    if checkpointing:  # the one layer that is recomputed is alive in the backward pass only
        expected -= (
            activations(shape._replace(layers=1), rows * length, length, False, rank) - rows * length * 7 * shape.hidden
        )
    assert measured == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("targets", ["auto", ("q_proj", "self_attn.v_proj")])
def test_an_adapters_parameters_are_counted_as_peft_makes_them(tiny_model, targets):
    settings = AdapterConfig(rank=4, targets=targets)
    model = load_causal_lm(str(tiny_model), "float32", "cpu").requires_grad_(False)
    add_adapter(model, lora_config(settings))
    counted = adapter_parameters(model_shape(tiny_model), settings)
    assert counted == sum(parameter.numel() for parameter in trainable(model))


@pytest.mark.parametrize("preset", ["swift-qwen1.5-1.8b-1x24", "sppo-mistral-7b-1x24", "tidpo-llama-3.2-3b-1x24"])
def test_the_presets_of_one_card_fit_24_gib(preset):
    lines = refuse_what_cannot_fit(load_run(f"deploy/runs/{preset}.yaml"))
    assert {line.need.gpus for line in lines} == {1} and max(line.need.device_bytes for line in lines) < 18 * GIB


def test_an_adapter_costs_its_factors_and_no_second_model():
    run = load_run("deploy/runs/tidpo-llama-3.2-3b-1x24.yaml")
    parameters = KNOWN["meta-llama/Llama-3.2-3B-Instruct"].parameters
    train = stage_memory(run)["train"]
    assert train.device["frozen weights"] == 2 * parameters and train.host["merge"] == 4 * parameters
    small = sum(train.device[name] for name in ("adapter", "gradients", "optimizer"))
    assert small < 0.06 * 2 * parameters and train.device["other models"] < 3 * GIB, "the reference's logits alone"
    one = {"training.adapter.name": "lora", "execution.gpu_memory_gib": 48}
    refuse_what_cannot_fit(load_run("deploy/runs/sppo-mistral-7b-1x24.yaml", one))  # 7 B without 4 bits


def test_the_cache_of_a_grouped_query_model():
    # Llama-3-8B: 32 layers x 8 heads x 128 x (k and v) x 2 bytes = 128 KiB a token; a quarter of it on 4 GPUs, no less on 16 than on 8.
    llama = KNOWN["meta-llama/Meta-Llama-3-8B-Instruct"]
    assert kv_cache_per_token(llama) == 128 * 1024
    assert kv_cache_per_token(llama, 4) == 32 * 1024
    assert kv_cache_per_token(llama, 16) == kv_cache_per_token(llama, 8)


def test_a_row_is_never_cut_however_small_the_budget():
    assert rows_of(100, 512, 512, 2).tokens == 2048
    assert rows_of(8192, 512, 512, 2).responses == 4096


def test_a_local_model_is_counted_from_its_files(tiny_model):
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        total = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert model_shape(tiny_model).parameters == total


def test_an_unknown_hub_model_is_named_not_fetched():
    with pytest.raises(ConfigError, match="nobody/nothing is neither in the local cache nor among those"):
        model_shape(ModelRef(hub_id="nobody/nothing"))


NODE = {"execution.gpus_per_node": 8, "execution.gpu_memory_gib": 80, "execution.host_memory_gib": 1000}
SMALL = {"execution.gpus_per_node": 2, "execution.gpu_memory_gib": 24, "execution.host_memory_gib": 256}


def test_what_a_plan_recommends_fits():
    run = load_run("deploy/runs/swift.yaml", SMALL)
    (line,) = [line for line in plan(run) if line.problem]
    assert line.need.stage == "train" and "GiB on each GPU, which has 24.0" in line.problem
    for advice in line.help:
        changes = dict(parse_assignment(text) for text in advice.split(", "))
        assert changes
        refuse_what_cannot_fit(load_run("deploy/runs/swift.yaml", SMALL | changes))


def test_a_model_beyond_all_settings_is_refused():
    tiny = {"execution.gpus_per_node": 1, "execution.gpu_memory_gib": 8, "execution.host_memory_gib": 64}
    with pytest.raises(ConfigError, match=r"no setting here makes it fit"):
        refuse_what_cannot_fit(load_run("deploy/runs/sppo.yaml", tiny))


def test_zero_cuts_what_it_says(tmp_path):
    base = NODE | {"training.runtime.num_processes": 8}
    parts = [
        stage_memory(load_run("deploy/runs/sppo.yaml", base | {"training.runtime.zero_stage": level}))["train"].device
        for level in range(4)
    ]
    for level, name in ((1, "optimizer"), (3, "weights")):
        assert parts[level - 1][name] == pytest.approx(8 * parts[level][name], rel=1e-6)
        assert parts[0][name] == parts[level - 1][name]
    # Under ZeRO gradients add up in float32: under ZeRO 1 whole, beside the model's own in bf16.
    gradient_bytes = [part["gradients"] / KNOWN["mistralai/Mistral-7B-Instruct-v0.2"].parameters for part in parts]
    assert gradient_bytes == pytest.approx([2, 2 + 4, 4 / 8, 4 / 8])
    parameters = KNOWN["mistralai/Mistral-7B-Instruct-v0.2"].parameters
    # Unsharded bf16 RMSprop: 2 weights + 2 gradients + 4 masters + 4 state + 4 float32 gradient = 16 bytes a parameter.
    assert sum(parts[0][name] for name in ("weights", "gradients", "optimizer")) == 16 * parameters


LLAMA_70B = Shape(70_553_706_496, 80, 8192, 28_672, 64, 8, 128, 128_256, 8192)
THRIFTY = {"zero_stage": 3, "offload_optimizer": True, "gradient_checkpointing": True, "batch_tokens": 4096}


@pytest.mark.parametrize(
    ("gpus", "gib", "host", "shape"),
    [(4, 24, 192, KNOWN["mistralai/Mistral-7B-Instruct-v0.2"]), (8, 80, 1024, LLAMA_70B)],
    ids=["7 B on 4 x 24", "70 B on 8 x 80"],
)
def test_no_rank_ever_holds_the_whole_model(gpus, gib, host, shape):
    settings = {f"training.runtime.{name}": value for name, value in (THRIFTY | {"num_processes": gpus}).items()}
    hardware = {"gpus_per_node": gpus, "gpu_memory_gib": gib, "host_memory_gib": host}
    run = load_run("deploy/runs/sppo.yaml", settings | {f"execution.{name}": value for name, value in hardware.items()})
    need = stage_memory(run, {"policy": shape, "scorer": KNOWN["llm-blender/PairRM-hf"]}, gpus)["train"]
    assert need.device_bytes < gib * GIB and sum(need.host.values()) < 0.95 * host * GIB
    # The weights of a rank while it loads: its part of them, in bf16.
    assert (
        need.device["weights"] == pytest.approx(2 * shape.parameters / gpus, rel=1e-6) and "start-up" not in need.device
    )


def test_a_worker_larger_than_every_node_is_refused():
    run = load_run(
        "deploy/runs/sppo.yaml",
        NODE | {"sampling.backend.name": "vllm", "sampling.backend.runtime.tensor_parallel_size": 16},
    )
    problems = {line.need.stage: line.problem for line in plan(run)}
    assert problems["sample"] == "one worker asks for 16 GPUs on a node, and no node has more than 8"


def test_more_nodes_than_there_are_is_refused():
    run = load_run("deploy/runs/sppo.yaml", NODE | {"training.runtime.num_nodes": 4, "execution.nodes": 2})
    assert {line.need.stage: line.problem for line in plan(run)}["train"] == "it asks for 4 nodes, and there are 2"


def test_the_command_prints_a_table_and_says_no_by_its_exit_code(capsys, tiny_model):
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    assert main(["deploy/runs/swift.yaml", *settings]) == 2
    shown = capsys.readouterr()
    assert re.search(r"^train +1 worker x 1 GPU .*DOES NOT FIT", shown.out, re.M)
    assert "1 stage without enough memory" in shown.err
    assert (
        main(
            ["deploy/runs/quickstart.yaml", "--set", "execution.gpus_per_node=0", "--set", f"policy.path={tiny_model}"]
        )
        == 0
    )


def test_the_hardware_is_what_the_config_says():
    have = hardware(load_run("deploy/runs/sppo.yaml", NODE))
    assert (have.nodes, have.gpus_per_node, have.gpu_bytes, have.host_bytes) == (1, 8, 80 * GIB, 1000 * GIB)
