"""Packed batches: each prompt once and no padding, and still the numbers of padded rows.

Strategy: small random models of every packable type, in float32, over prompts and responses of many lengths; padded rows and plain torch are
the reference, for log-probs and for the gradients of all weights. The layout of one small batch by hand.
"""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stages.models.kernels
from stages.models.kernels import TokenLogps, fuses, head_logps
from stages.models.packing import PACKABLE, Varlen, group_prompts, pack, packable, takes_varlen
from stages.models.policy import batches_by_sum, collate, load_causal_lm, response_logps, score_responses

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
SPECIAL = {
    "gpt2": {
        "vocab_size": 320,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "mistral": SIZES | {"sliding_window": None},
    "qwen3": SIZES | {"head_dim": 16},
}


def build(kind: str, directory, **changes):
    """A random model of a type, loaded as the stages load theirs."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(SPECIAL.get(kind, SIZES) | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load_causal_lm(str(directory), "float32", "cpu")


def texts(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Two responses to each of five prompts, a third one to the first."""
    draw = random.Random(seed)
    one = lambda most: [draw.randrange(5, 300) for _ in range(draw.randint(1, most))]  # noqa: E731
    prompts = [one(14) for _ in range(5)]
    prompts = [*prompts, *prompts, prompts[0]]
    return prompts, [one(9) for _ in prompts]


def gradients(model, batch, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of their weighted sum by every weight."""
    model.zero_grad()
    logps = response_logps(model, batch)
    (logps * weights).sum().backward()
    return logps.detach(), torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


# --- the numbers


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_log_probs_and_gradients_of_a_packed_batch_are_those_of_padded_rows(kind, tmp_path):
    model = build(kind, tmp_path)
    assert packable(model, 23)
    prompts, responses = texts()
    padded, packed = collate(prompts, responses), pack(prompts, responses)
    assert packed.input_ids.numel() < 0.7 * padded.input_ids.numel()
    weights = torch.rand(padded.response_ids.shape, generator=torch.Generator().manual_seed(0))
    ours, plain = gradients(model, packed, weights), gradients(model, padded, weights)
    for left, right in zip(ours, plain, strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm()
    # And the loss has something to do with the model.
    assert plain[1].norm() > 1 and plain[0].std() > 0.1


def test_a_response_does_not_see_the_other_responses_to_its_prompt(tiny_model):
    model = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    one, other = pack([[5, 6]] * 2, [[7, 8], [9, 10]]), pack([[5, 6]] * 2, [[7, 8], [11, 12]])
    with torch.no_grad():
        left, right = response_logps(model, one), response_logps(model, other)
    assert torch.equal(left[0], right[0]) and not torch.allclose(left[1], right[1])


def test_scores_do_not_depend_on_packing_or_its_budget(tiny_model):
    model = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    prompts, responses = texts(3)
    whole = score_responses(model, prompts, responses, 4096)
    model.config.model_type = "unknown"  # padded rows
    assert not packable(model, 23)
    padded = score_responses(model, prompts, responses, 4096)
    model.config.model_type = "llama"
    for budget in (1, 30, 80):
        for left, right, plain in zip(score_responses(model, prompts, responses, budget), whole, padded, strict=True):
            assert abs(left - right).max() < 1e-5 and abs(left - plain).max() < 1e-5


@pytest.mark.parametrize("length", [stages.models.kernels.SHORT, 0])
def test_bf16_attention_is_as_near_to_float32_by_either_way(tiny_model, monkeypatch, length):
    # Short groups take plain products in bf16 on a CPU, long ones torch's fused kernel.
    monkeypatch.setattr(stages.models.kernels, "SHORT", length)
    exact = load_causal_lm(str(tiny_model), "float32", "cpu").eval()
    rounded = load_causal_lm(str(tiny_model), "bfloat16", "cpu").eval()
    prompts, responses = texts(1)
    with torch.no_grad():
        gap = (
            response_logps(rounded, pack(prompts, responses)) - response_logps(exact, pack(prompts, responses))
        ).abs()
    assert 0 < gap.mean() < 0.06


def test_a_window_hides_nothing_of_rows_that_are_no_longer(tmp_path):
    model = build("mistral", tmp_path / "window", sliding_window=24)
    assert packable(model, 23) and packable(model, 24) and not packable(model, 25)
    prompts, responses = texts()
    padded, packed = collate(prompts, responses), pack(prompts, responses)
    with torch.no_grad():
        assert (response_logps(model, padded) - response_logps(model, packed)).abs().max() < 1e-5
    # Padded rows still have their window: 8 tokens see another past than 24.
    narrow = build("mistral", tmp_path / "narrow", sliding_window=8)
    with torch.no_grad():
        gap = (response_logps(model, padded) - response_logps(narrow, padded)).abs().max()
    assert gap > 1e-3 and not packable(narrow, 23)


def test_a_model_whose_attention_is_not_plain_is_padded(tmp_path):
    assert not packable(build("gemma2", tmp_path / "gemma", head_dim=16), 8)
    assert not packable(lambda **_: None, 8)


# --- flash attention of variable lengths, without a GPU: a plain kernel in its place


def plain_flash(query, key, value, layout, scale):
    """What flash attention computes: each sequence by itself, its causal mask on the bottom right corner."""
    heads = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    for sequence in range(len(layout.query_starts) - 1):
        queries = slice(*layout.query_starts[sequence : sequence + 2].tolist())
        keys = slice(*layout.key_starts[sequence : sequence + 2].tolist())
        asked, seen = queries.stop - queries.start, keys.stop - keys.start
        assert asked <= layout.longest_query and seen <= layout.longest_key
        mask = torch.ones(asked, seen, dtype=torch.bool).tril(seen - asked)
        q, k, v = query[queries].transpose(0, 1), key[keys].transpose(0, 1), value[keys].transpose(0, 1)
        k, v = k.repeat_interleave(heads, 0), v.repeat_interleave(heads, 0)
        scores = (q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)).masked_fill(~mask, float("-inf"))
        out[queries] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_variable_length_attention_has_the_numbers_of_padded_rows(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.models.kernels, "flash", plain_flash)
    model = build(kind, tmp_path)
    prompts, responses = texts()
    padded, packed = collate(prompts, responses), pack(prompts, responses, varlen=True)
    assert isinstance(packed.layout, Varlen)
    weights = torch.rand(padded.response_ids.shape, generator=torch.Generator().manual_seed(0))
    ours, plain = gradients(model, packed, weights), gradients(model, padded, weights)
    for left, right in zip(ours, plain, strict=True):
        assert (left - right).norm() <= 1e-5 * right.norm()


def test_the_layout_of_variable_lengths_by_hand():
    layout = pack([[1, 2], [3], [1, 2]], [[4], [5, 6], [7, 8]], varlen=True).layout
    # Tokens 1 2 4 7 8 and 3 5 6; sequences: 1 2 4; 7 8 after 1 2; 3 5 6.
    assert layout.query_starts.tolist() == [0, 3, 5, 8] and layout.longest_query == 3
    assert layout.key_starts.tolist() == [0, 3, 7, 10] and layout.longest_key == 4
    assert layout.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert layout.copies.tolist() == [[0, 1, 2, 5, 6, 7, 8, 9], [3, 4, -1, -1, -1, -1, -1, -1]]


def test_any_number_of_responses_shares_a_prompt_where_attention_has_no_square(tiny_model):
    assert len(pack([[1, 2]] * 9, [[5] * 600] * 9, varlen=True).input_ids[0]) == 2 + 9 * 600
    assert not takes_varlen(load_causal_lm(str(tiny_model), "bfloat16", "cpu"))  # a CPU has no flash attention


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_gpus_flash_attention_has_the_numbers_of_padded_rows(kind, tmp_path):
    exact = build(kind, tmp_path)
    model = load_causal_lm(str(tmp_path), "bfloat16", "cuda:0")
    assert takes_varlen(model)
    prompts, responses = texts()
    padded = collate(prompts, responses)
    weights = torch.rand(padded.response_ids.shape, generator=torch.Generator().manual_seed(0))
    truth = gradients(exact, padded, weights)
    errors = {}
    for name, batch in (
        ("flash", pack(prompts, responses, varlen=True)),
        ("grouped", pack(prompts, responses)),
        ("padded", padded),
    ):
        values = gradients(model, batch.to("cuda:0"), weights.to("cuda:0"))
        errors[name] = [
            float((left.float().cpu() - right).norm() / right.norm()) for left, right in zip(values, truth, strict=True)
        ]
    # Each way rounds to bf16 elsewhere: flash may be as far from float32 as padded rows are, and little more.
    for number in range(2):
        assert errors["flash"][number] < 1.5 * errors["padded"][number] + 1e-3, errors
        assert errors["grouped"][number] < 1.5 * errors["padded"][number] + 1e-3, errors


def test_an_exported_model_does_not_name_our_attention(tiny_model, tmp_path):
    load_causal_lm(str(tiny_model), "float32", "cpu").save_pretrained(tmp_path)
    assert stages.models.kernels.NAME not in (tmp_path / "config.json").read_text()


# --- log-probs out of logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 30, 10**6])
def test_log_probs_in_chunks_are_those_of_log_softmax_with_the_same_gradient(monkeypatch, dtype, chunk):
    monkeypatch.setitem(stages.models.kernels.CHUNKS, "cpu", chunk)
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 11, generator=draw, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    ids, weights = torch.randint(11, (7,), generator=draw), torch.randn(7, generator=draw, dtype=torch.float64)
    ours = TokenLogps.apply(logits, ids)
    exact = logits.detach().double().requires_grad_()
    plain = exact.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    (ours * weights.to(ours.dtype)).sum().backward()
    (plain * weights).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert (ours - plain).abs().max() < tolerance
    assert (logits.grad.double() - exact.grad).abs().max() < max(tolerance, 2 * torch.finfo(dtype).eps)


# --- log-probs out of the head's input, without logits


def linear(dtype: torch.dtype, bias: bool, size: int = 300) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A head, the input of seven tokens and their ids; the first id and the last one of the vocabulary among them."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, size, bias=bias).to(dtype)
    hidden = (torch.randn(7, 16, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    return head, hidden, torch.tensor([0, size - 1, 127, 128, 5, 255, 256])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("chunk", [1, 7 * 200, 10**6])  # 128 entries of the vocabulary at a time, the same, all
def test_log_probs_without_logits_are_those_of_the_logits_with_the_same_gradients(
    monkeypatch, dtype, tolerance, chunk, bias
):
    head, hidden, ids = linear(dtype, bias)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for fused in (False, True):
        monkeypatch.setitem(stages.models.kernels.CHUNKS, "cpu", chunk if fused else 10**6)
        head.zero_grad()
        hidden.grad = None
        logps = head_logps(head, hidden, ids) if fused else TokenLogps.apply(head(hidden), ids)
        (logps * weights.to(logps.dtype)).sum().backward()
        results.append([logps.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == plain.dtype and (ours - plain).norm() <= tolerance * plain.norm()


def test_a_frozen_head_gets_no_gradient_and_its_input_does():
    head, hidden, ids = linear(torch.float32, False)
    head.requires_grad_(False)
    head_logps(head, hidden, ids).sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


def test_no_tensor_of_all_logits_is_made_forwards_or_backwards(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    head, hidden, ids = linear(torch.float32, False, 4096)
    monkeypatch.setitem(stages.models.kernels.CHUNKS, "cpu", 7 * 128)
    with Largest():
        head_logps(head, hidden, ids).sum().backward()
    # The head's weight and its gradient are the largest; of logits there are 128 a token at a time.
    assert Largest.size == head.weight.numel()
    Largest.size = 0
    with Largest(), torch.no_grad():
        head_logps(head, hidden, ids)
    assert Largest.size <= head.weight.numel() // 2


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_a_models_log_probs_without_logits_are_those_with_them(kind, tmp_path, monkeypatch):
    model = build(kind, tmp_path)
    prompts, responses = texts()
    weights = torch.rand(collate(prompts, responses).response_ids.shape, generator=torch.Generator().manual_seed(0))
    for batch in (collate(prompts, responses), pack(prompts, responses)):
        plain = gradients(model, batch, weights)
        with monkeypatch.context() as patch:
            patch.setattr(stages.models.kernels, "fuses", lambda head, tokens: isinstance(head, torch.nn.Linear))
            fused = gradients(model, batch, weights)
        for left, right in zip(fused, plain, strict=True):
            assert (left - right).norm() <= 1e-6 * right.norm()
        assert torch.equal(fused[0] == 0, plain[0] == 0)
        assert "forward" not in vars(model.get_output_embeddings())  # the head gives logits again


def test_gpus_go_without_logits_unless_a_training_has_few(monkeypatch):
    def head(vocabulary: int) -> torch.nn.Module:
        module = torch.nn.Linear(1, 1)
        module.out_features, module.weight.data = vocabulary, torch.zeros(1)
        return module

    assert not fuses(head(152_064), 10**6) and not fuses(None, 10**6)  # the CPU's numbers stay what they were
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert fuses(head(152_064), 6_000) and not fuses(head(152_064), 2_048)
    with torch.no_grad():
        assert fuses(head(152_064), 2_048)
    assert not fuses(torch.nn.Embedding(3, 2), 10**9)


# --- the layout


def test_a_packed_batch_by_hand():
    batch = pack([[1, 2], [3], [1, 2]], [[4], [5, 6], [7, 8]])
    # Group one: the prompt 1 2 with the responses 4 and 7 8; group two: the prompt 3 with 5 6.
    assert batch.input_ids.tolist() == [[1, 2, 4, 7, 8, 3, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    assert batch.layout.cells.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]
    assert batch.layout.tokens.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.sources.tolist() == [1, 5, 6, 1, 3]  # what predicts 4, 5 6, 7 8
    assert batch.response_ids.tolist() == [[4, 0], [5, 6], [7, 8]]
    assert batch.response_mask.tolist() == [[True, False], [True, True], [True, True]]
    assert batch.layout.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_two_responses_always_share_their_prompt_and_more_of_them_while_they_are_short():
    assert group_prompts([[1], [2], [1], [1]], [[5], [5], [6], [7]]) == [[0, 2, 3], [1]]
    assert group_prompts([[1]] * 4, [[5] * 600] * 4) == [[0, 1], [2, 3]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_by_sum_take_every_row_once_within_the_budget(lengths, budget):
    batches = batches_by_sum(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(sums, batches, strict=True))


def test_batches_are_filled_evenly():
    assert [len(batch) for batch in batches_by_sum([10] * 8, 60)] == [4, 4]  # not 6 and 2
    assert batches_by_sum([5, 1, 9], 100) == [[2, 0, 1]]
