"""Stages - a causal language model and log-probabilities of responses under it, for weigh, train and evaluate.

Axes: N responses, L tokens of the longest prompt with its response, T tokens of the longest response, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from data_contracts.adapter import adapter_in, base_of, weights_directory
from data_contracts.errors import ConfigError
from data_contracts.files import follow_umask
from stages.models.architecture import refuse_misfit
from stages.models.families import attention_in
from stages.models.lazy import import_transformers, torch
from stages.models.numerics import token_logps
from stages.models.packing import (
    GROUP_TOKENS,
    Grouped,
    Packed,
    group_prompts,
    pack,
    packable,
    packable_type,
    takes_varlen,
    to_device,
)
from stages.running.cost import loading

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


class Batch(NamedTuple):
    """Rows of prompt and response, padded at their end: a causal model needs no mask for that."""

    input_ids: Tensor  # [N, L]
    in_row: Tensor  # [N, L] bool: prompt and response
    sources: Tensor  # [N, T] the position whose logits predict response token t; 0 outside the mask
    response_ids: Tensor  # [N, T]
    response_mask: Tensor  # [N, T] bool

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on a device."""
        return Batch._make(to_device(tensor, device) for tensor in self)


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Return a `Batch` whose width is the longest prompt with its response. Padding ids are 0; any id would do."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    ids = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
    in_row = np.zeros(ids.shape, dtype=bool)
    response_ids = np.zeros((len(prompts), max(map(len, responses))), dtype=np.int64)
    mask = np.zeros(response_ids.shape, dtype=bool)
    sources = np.zeros_like(response_ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(prompt)], ids[row, len(prompt) : lengths[row]] = prompt, response
        in_row[row, : lengths[row]] = True
        response_ids[row, : len(response)], mask[row, : len(response)] = response, True
        sources[row, : len(response)] = np.maximum(np.arange(len(prompt) - 1, lengths[row] - 1), 0)
    return Batch(*(torch.from_numpy(array) for array in (ids, in_row, sources, response_ids, mask)))


QUANTISED = "nf4-"
"""Before a dtype: the weights of the linear layers in 4 bits (NF4, by bitsandbytes), arithmetic in that dtype."""


def load_causal_lm(directory: str, dtype: str, device: str) -> PreTrainedModel:
    """Return the model of a directory on a device, without dropout and without a generation cache.

    Policy and reference must be the same function at the start of training: dropout would make their log-ratios noise.
    A checkpoint that keeps an adapter only is its base model with the adapter in effect, frozen; so is any checkpoint
    with an adapter where the weights are to be quantised (`QUANTISED`), as they were while it was trained.
    Raises: ConfigError for files that lack a tensor of the model, have one of another shape, or more layers.
    """
    is_quantised = dtype.startswith(QUANTISED)
    weights = weights_directory(directory)
    if is_quantised and adapter_in(directory) is not None:
        weights = base_of(Path(directory))
    if str(weights) != str(directory):
        return _load_base_and_adapter(directory, str(weights), dtype, device)
    from stages.models.kernels import register

    transformers = import_transformers()
    with loading():
        model: PreTrainedModel
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype.removeprefix(QUANTISED)),
            quantization_config=_quantisation(dtype) if is_quantised else None,
            attn_implementation=attention_in(directory),
            # A GPU reads the memory-mapped files tensor by tensor: the host never holds the whole model.
            device_map=None if torch.device(device).type == "cpu" and not is_quantised else {"": device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    refuse_misfit(directory, model, report)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' other kernel for passes without gradients
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - as below
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - an attribute that torch's Module does not declare
    model.config.use_cache = False
    if packable_type(model):
        model.set_attn_implementation(register())
    torch.nn.Module.to(model, device)
    return model


def _quantisation(dtype: str) -> Any:
    """Settings of QLoRA (Dettmers et al. 2023): NF4, its scales in 8 bits. Raises: ConfigError without bitsandbytes."""
    from transformers import BitsAndBytesConfig

    check_quantisation()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype.removeprefix(QUANTISED)),
    )


def check_quantisation() -> None:
    """Raises: ConfigError if this interpreter has no bitsandbytes."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "training.adapter.name qlora needs bitsandbytes, which is not installed: pip install --no-deps bitsandbytes "
            "(the extra `qlora`), or set the name lora"
        )


def _load_base_and_adapter(directory: str, base: str, dtype: str, device: str) -> PreTrainedModel:
    from stages.models.adapters import load_adapter

    model, adapter = load_causal_lm(base, dtype, device), adapter_in(directory)
    assert adapter is not None
    load_adapter(model, adapter)
    return model.requires_grad_(False)


def save_model(model: PreTrainedModel, state: dict[str, Tensor], directory: Path, dtype: str) -> None:
    """Write a Hugging Face directory: `model`'s settings, and the weights of `state` by parameter, in `dtype`."""
    owner = {parameter: name for name, parameter in model.named_parameters()}
    # named_parameters() lists a tensor that two parameters share (a tied lm_head) once.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state.setdefault(name, state[owner[parameter]])
    model.config.use_cache = True
    model.save_pretrained(directory, state_dict=state)
    model.config.use_cache = False  # training may go on
    # transformers writes the dtype that the model computes in, and loads weights in the dtype of config.json.
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}, indent=2) + "\n")
    follow_umask(directory)


def response_logits(model: Module, batch: Batch, **inputs: Tensor) -> Tensor:
    """Return the logits [N, T, V] that predict the response tokens; undefined outside the mask.

    `inputs`: what the model reads instead of `input_ids`. The head is computed for these positions alone: they are
    picked out of the hidden states on their way into the module that transformers calls the output embeddings.
    """
    head = _head(model)
    picked = []

    def pick(_: Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        picked.append(True)
        return (_positions(hidden[0], batch.sources), *hidden[1:])

    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        logits = model(**(inputs or {"input_ids": batch.input_ids}), use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    if picked:
        return logits
    return _positions(logits, batch.sources)


def _positions(values: Tensor, index: Tensor) -> Tensor:
    """Return values[row, index[row, t]]: [N, L, H] and [N, T] -> [N, T, H]."""
    rows, length, units = values.shape
    starts = torch.arange(rows, device=index.device)[:, None] * length
    return values.reshape(-1, units).index_select(0, (index + starts).reshape(-1)).view(*index.shape, units)


def response_logps(model: Module, batch: Batch | Packed) -> Tensor:
    """Return log pi(y_t | x, y_<t) of every response token, [N, T] float32, 0 outside the mask."""
    from stages.models.kernels import fuses

    is_fused = packable_type(model) and fuses(_head(model), _scored_ids(batch).numel())
    if isinstance(batch, Batch):
        if is_fused:
            with _head_gives_logps(model, _scored_ids(batch)):
                logps = response_logits(model, batch)[..., 0]
            return torch.where(batch.response_mask, logps, torch.zeros((), dtype=logps.dtype, device=logps.device))
        return token_logps(response_logits(model, batch), batch.response_ids, batch.response_mask)
    if isinstance(batch.layout, Grouped):
        mask = batch.layout.mask
    else:  # four axes keep transformers from making a mask; flash attention reads none
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    with _head_gives_logps(model, batch.targets) if is_fused else nullcontext():
        output = model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.sources,
            packing=batch.layout,
        )
    if is_fused:
        logps = output.logits[0, :, 0]
    else:
        logps = token_logps(output.logits[0], batch.targets, torch.ones_like(batch.targets, dtype=torch.bool))
    shape = batch.response_ids.shape
    return logps.new_zeros(shape.numel()).scatter(0, batch.scored, logps).view(shape)


def _scored_ids(batch: Batch | Packed) -> Tensor:
    """The ids [n] whose log-probs the model's head is computed for."""
    return batch.response_ids.reshape(-1) if isinstance(batch, Batch) else batch.targets


def _head(model: Module) -> Module | None:
    """The module that transformers calls the output embeddings."""
    find_head = getattr(getattr(model, "module", model), "get_output_embeddings", None)
    return find_head() if find_head else None


@contextmanager
def _head_gives_logps(model: Module, ids: Tensor) -> Iterator[None]:
    """Let the model's head return the log-probs [..., 1] of the ids in place of the logits [..., V].

    Its other hooks stay (ZeRO 3 gathers its weight there), so it is called as ever. For models that do no more with
    logits than return them: those of PACKABLE.
    """
    from stages.models.kernels import head_logps

    head = cast("torch.nn.Linear", _head(model))
    before = vars(head).get("forward")

    def forward(hidden: Tensor) -> Tensor:
        return head_logps(head, hidden.reshape(-1, hidden.shape[-1]), ids).view(*hidden.shape[:-1], 1)

    setattr(head, "forward", forward)  # noqa: B010 - the method's parameter has another name
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def batches_by_budget(lengths: Sequence[int], budget: int, cells: float = math.inf) -> Iterator[list[int]]:
    """Yield indices in batches of at most `budget` padded tokens and `cells` cells of attention, longest first.

    A batch has at least one row.

    Longest first makes an out-of-memory error come at once; similar lengths side by side waste the least padding.
    Deterministic: ties go by index.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest, rows = lengths[batch[0]] if batch else 0, len(batch) + 1
        if rows * longest > budget or rows * longest**2 > cells:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def batches_by_sum(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices in as few evenly filled batches as the budget on summed lengths allows, longest first.

    A batch has at least one row.

    Deterministic: ties go by index.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def fill(limit: int) -> list[list[int]]:
        batches, room = [], 0
        for index in order:
            if lengths[index] > room or not batches:
                batches.append([])
                room = limit
            batches[-1].append(index)
            room -= lengths[index]
        return batches

    fewest, low, high = len(fill(budget)), 1, budget
    while low < high:  # find the smallest limit that needs no more batches: the fullest batch sets the peak of memory
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) == fewest else (middle + 1, high)
    return fill(low)


def score_responses(
    model: Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    budget: int,
    packing: bool = True,
) -> list[np.ndarray]:
    """Return the per-token log-probs of every response under a frozen model, float32, in the order given.

    packing: without padding, where the model can be packed; False: in padded rows
    """
    results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(prompts)
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    device = next(model.parameters()).device
    packed, varlen = packing and packable(model, max(lengths, default=0)), takes_varlen(model)
    if packed:
        groups = group_prompts(prompts, responses, math.inf if varlen else GROUP_TOKENS)
        sizes = [len(prompts[group[0]]) + sum(len(responses[i]) for i in group) for group in groups]
        batches = [[i for number in batch for i in groups[number]] for batch in batches_by_sum(sizes, budget)]
    else:
        batches = list(batches_by_budget(lengths, budget))
    with torch.inference_mode():
        for rows in batches:
            row_prompts, row_responses = [prompts[i] for i in rows], [responses[i] for i in rows]
            if packed:
                batch = pack(row_prompts, row_responses, varlen).to(device)
            else:
                batch = collate(row_prompts, row_responses).to(device)
            logps = response_logps(model, batch).float().cpu().numpy()
            for i, row in zip(rows, logps, strict=True):
                results[i] = row[: len(responses[i])].copy()
    return results


def pick_device(setting: str) -> str:
    """The device that a setting means: `auto` is the GPU if there is one, else the CPU."""
    if setting != "auto":
        return setting
    if torch.cuda.is_available():
        return "cuda"
    return "cpu"


def pin_threads(count: int | None) -> None:
    """Let torch use `count` CPU threads; None: as many as this process may run on."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
