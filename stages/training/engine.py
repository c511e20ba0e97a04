"""Stages - the training engine: DeepSpeed with ZeRO 0-3, one process or many; the only file that imports DeepSpeed.

Facts of DeepSpeed 0.19 that shape it: gradients are averaged over ranks; a resumed run is bit-exact; load_checkpoint of
a missing directory returns (None, None) instead of raising; some ops want a compiler at first use, and none is needed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_contracts.errors import ConfigError, ContractError, TransientError
from stages.models.adapters import trainable
from stages.models.lazy import absent, torch
from stages.models.policy import save_model
from stages.models.turn_settings import TurnConfig
from stages.models.turns import turns_or_plain
from stages.training.adapter import TrainedAdapter
from stages.training.optimizer import make_optimizer, make_schedule
from stages.training.resume import forget, seal, sealed
from stages.training.weights import StoredWeights, load_policy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

    from stages.training.config import TrainingConfig

LOOPBACK = "127.0.0.1"
"""The address at which the ranks of one node meet."""
PARTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Weights whose float32 gradient exists at a time, by type of device: a GPU updates a 2 B model in seven calls."""


class Engine:
    """A policy, its optimizer and its schedule."""

    def __init__(self, config: TrainingConfig, model: str, num_steps: int, device: str, start: str | None = None):
        """`start`: the model that the adapter inside `model` belongs to, if the training goes on with it."""
        deepspeed = import_deepspeed(device)
        self.config, self.device = config, device
        _join(deepspeed, config.runtime.collective_timeout_seconds)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.torch_device = torch.device(device)
        if device == "cuda":
            self.torch_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.torch_device)
        torch.manual_seed(config.seed)
        self.stop_ids = turns_or_plain(model, TurnConfig()).stop_ids
        settings = deepspeed_settings(config, device)
        self.adapter: TrainedAdapter | None = None
        masters: list[tuple[Parameter, Callable[[], Tensor]]] = []
        if config.adapter is not None:
            self.adapter = TrainedAdapter(config, model, start, str(self.torch_device))
            policy = self.adapter.policy
        else:
            policy = load_policy(model, config.dtype, str(self.torch_device), settings)
            stored = StoredWeights(model, policy)
            if config.dtype != "float32" and not stored.are_bfloat16():
                masters = list(stored.masters())
            del stored
        policy.train()
        if config.runtime.gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = make_optimizer(config, trainable(policy), device)
        schedule = make_schedule(config, optimizer, num_steps)
        self.engine, *_ = deepspeed.initialize(
            model=policy, optimizer=optimizer, lr_scheduler=schedule, config=settings
        )
        self._set_masters(masters)
        if self.adapter is not None:
            self.engine.module_state_dict = self.adapter.state
        del policy, masters
        _return_memory()

    def _set_masters(self, masters: list[tuple[Parameter, Callable[[], Tensor]]]) -> None:
        """Set the float32 master weights to the policy's stored weights.

        DeepSpeed makes them from a model in bf16: the small updates of the iteration before would be lost.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        copies = _float32_copies(self.engine.optimizer)
        for parameter, read in masters:
            if parameter in copies:
                copies[parameter].data.copy_(read())
            elif hasattr(parameter, "ds_id"):
                set_part(_zero3_master(parameter), read(), self.rank)
            else:
                safe_set_full_fp32_param(parameter, read().to(device=self.torch_device, dtype=torch.float32))

    @property
    def model(self) -> torch.nn.Module:
        """The model as it is trained: its forward goes through DeepSpeed."""
        return self.engine

    @property
    def module(self) -> PreTrainedModel:
        """The bare model, for uses that must not go through DeepSpeed's hooks: generation, gradients of embeddings."""
        return self.engine.module

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of a micro-batch's share of the step's mean loss; `last`: its last micro-batch.

        The share is divided by the counts of the whole step: DeepSpeed must not divide again, and its mean over ranks
        is undone.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # not an update: it counts the micro-batch

    def step(self) -> tuple[float, Tensor | float | None]:
        """Clip, update and advance the schedule; returns the learning rate and, where known, the gradient's norm."""
        rate, norm = float(self.engine.get_lr()[0]), None
        if self.config.dtype == "float32" and self.config.runtime.zero_stage == 0:  # DeepSpeed keeps no norm then
            gradients = [weight.grad for weight in trainable(self.module) if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        self.engine.step()
        return rate, self.engine.get_global_grad_norm() if norm is None else norm

    def seed_dropout(self, step: int) -> None:
        """Seed the dropout of an adapter for a step; nothing else in a training draws numbers."""
        if self.adapter is not None:
            self.adapter.seed_dropout(step, self.rank)

    def total(self, values: list[Tensor | float]) -> Tensor:
        """Return the sums over ranks, float64 on the device; every rank must give the same number of values."""
        device = self.torch_device
        scalars = []
        for value in values:
            is_tensor = isinstance(value, torch.Tensor)
            scalars.append(value if is_tensor else torch.full((), value, dtype=torch.float64, device=device))
        sums = torch.stack(scalars)
        torch.distributed.all_reduce(sums)
        return sums

    def save(self, directory: Path, step: int) -> None:
        """Write a checkpoint to resume from, then remove the one before; a kill in between leaves the old one valid."""
        tag, is_partial = f"step{step}", self.adapter is not None
        self.engine.save_checkpoint(
            str(directory),
            tag=tag,
            client_state={"step": step},
            save_latest=False,
            exclude_frozen_parameters=is_partial,
        )
        self.barrier()
        if self.is_main:
            seal(directory, tag)

    def resume(self, directory: Path) -> int:
        """Load the last whole checkpoint, if there is one; returns the number of steps that are done.

        Raises: TransientError if it cannot be loaded; the next try then trains from the start.
        """
        if (tag := sealed(directory)) is None:
            return 0
        try:
            path, state = self.engine.load_checkpoint(str(directory), tag=tag, load_module_strict=self.adapter is None)
            if path is None:
                raise ValueError("DeepSpeed finds no checkpoint in it")
            return int(state["step"])
        except Exception as error:  # damaged bytes make torch raise anything, maybe with half of the state loaded
            forget(directory)
            raise TransientError(
                f"the checkpoint {directory}/{tag} cannot be loaded ({type(error).__name__}: {error}): "
                "the next try trains from the start"
            ) from error

    def export(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory, in `save_dtype`, from the float32 master weights.

        Raises: ContractError if a weight is not finite.
        """
        if self.adapter is not None:
            if self.is_main:
                self.adapter.export(directory)
            self.barrier()
            return
        from deepspeed.utils import safe_get_full_fp32_param

        dtype = getattr(torch, self.config.save_dtype)
        module, copies = self.engine.module, _float32_copies(self.engine.optimizer)
        state = {}
        for name, parameter in module.named_parameters():
            # Collective under ZeRO: every rank takes part, the main rank keeps the weight.
            full = copies[parameter] if parameter in copies else safe_get_full_fp32_param(parameter)
            full = parameter.detach() if full is None else full
            if not torch.isfinite(full).all():  # vLLM would sample token 0 for ever from such weights, without an error
                raise ContractError(
                    f"the trained weights hold NaN or infinity, first in {name}: lower training.learning_rate"
                )
            if self.is_main:
                state[name] = full.to(device="cpu", dtype=dtype).clone()
        if self.is_main:
            save_model(module, state, directory, self.config.save_dtype)
        self.barrier()

    def barrier(self) -> None:
        torch.distributed.barrier()

    def close(self) -> None:
        self.barrier()
        torch.distributed.destroy_process_group()


def import_deepspeed(device: str) -> ModuleType:
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its JIT needs a compiler
    try:
        with absent("mlflow"):  # its autotuner would import it: 2 s of processor time
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"deepspeed does not import ({error}). Install the extra `cpu` or `gpu`, "
            "or name an interpreter that has it in training.runtime.python"
        ) from error
    if device == "cpu":
        # Its shared-memory collectives compile with g++ at first use (36 s, or an error without g++); gloo needs none.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    # The first step makes the optimizer's states; DeepSpeed would make them with a step of zero gradients.
    FP16_UnfusedOptimizer.initialize_optimizer_states = lambda self: None
    FP16_UnfusedOptimizer.step = _step_in_parts
    return deepspeed


def _step_in_parts(self: Any, closure: None = None) -> bool:
    """Update bf16 weights without ZeRO, through their float32 copies; returns False: no update is skipped.

    The numbers are DeepSpeed's own. Its step makes float32 gradients of all weights at once and reads them twice more;
    this one takes a part of the weights at a time. The norm stays on the device, so that the host need not wait for it:
    a gradient that is not finite shows in the metrics of the step, and stops the training (bad_step.py).
    """
    pairs = [
        (low, high)
        for lows, highs in zip(self.fp16_groups, self.fp32_groups, strict=True)
        for low, high in zip(lows, highs, strict=True)
    ]
    norms = [torch.linalg.vector_norm(low.grad, dtype=torch.float32) for low, _ in pairs if low.grad is not None]
    self._global_grad_norm = norm = torch.linalg.vector_norm(torch.stack(norms))
    self.overflow = False
    self._update_scale(False)
    factor = torch.ones((), dtype=torch.float64, device=norm.device)
    if self.clip_grad > 0.0:
        factor = 1.0 / ((norm.double() + 1e-6) / self.clip_grad).clamp_min(1.0)
    part: list[tuple[Tensor, Tensor]] = []
    most = PARTS[norm.device.type]
    for number, (low, high) in enumerate(pairs):
        high.grad = torch.zeros_like(high) if low.grad is None else low.grad.to(high.dtype).mul_(factor)
        part.append((low, high))
        if number + 1 == len(pairs) or sum(master.numel() for _, master in part) >= most:
            self.optimizer.step()  # skips weights without a gradient
            for weight, master in part:
                master.grad = None
                weight.data.copy_(master.data)
            part = []
    return self.overflow


def _join(deepspeed: ModuleType, timeout: float) -> None:
    """Join the ranks that the launcher started, or be the only rank."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        os.environ.update(
            {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
        )
    if os.environ["MASTER_ADDR"] == LOOPBACK:
        _meet_on_loopback(deepspeed.accelerator.get_accelerator().communication_backend_name(), timeout)
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout))


def _meet_on_loopback(backend: str, timeout: float) -> None:
    """Start torch.distributed among the ranks of one node. torch's own meeting point listens on all interfaces; this
    one, and the sockets of gloo and NCCL, are seen by nobody else.
    """
    import torch.distributed as dist

    if dist.is_initialized():  # by an earlier training of this process
        return
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    patience = timedelta(seconds=timeout)
    listening = {}
    if rank == 0:
        listening["master_listen_fd"] = socket.create_server((LOOPBACK, port)).detach()
    # torch documents TCPStore and leaves it out of __all__.
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        LOOPBACK, port, world_size, rank == 0, patience, wait_for_workers=False, **listening
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)


def deepspeed_settings(config: TrainingConfig, device: str) -> dict[str, Any]:
    """Return DeepSpeed's settings. Its gradient accumulation is 1: `Engine.backward` accumulates.

    Under ZeRO, bf16 gradients add up in float32 (without ZeRO, DeepSpeed cannot), and GPUs reduce them while the
    backward pass goes on.
    """
    # With an adapter, DeepSpeed sees a float32 training: of the factors alone, whatever the frozen weights' dtype.
    is_mixed = config.dtype == "bfloat16" and config.adapter is None
    zero: dict[str, Any] = {"stage": config.runtime.zero_stage}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": is_mixed},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # RMSprop
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if config.runtime.zero_stage:
        zero["offload_optimizer"] = {"device": "cpu" if config.runtime.offload_optimizer else "none"}
        zero["overlap_comm"] = device == "cuda"
        if is_mixed:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _zero3_master(parameter: Parameter) -> Tensor:
    """Return this rank's part of a parameter's float32 master weight under ZeRO 3."""
    optimizer: Any = getattr(parameter, "_z3_optimizer")  # noqa: B009 - set by DeepSpeed
    part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
    return part.detach()


def set_part(part: Tensor, whole: Tensor, rank: int) -> None:
    """Copy a rank's part of a tensor that is cut into equal parts, the last of which may be longer than what is left.

    DeepSpeed's own setter raises where a tensor's size is no multiple of the ranks.
    """
    values = whole.flatten()[part.numel() * rank : part.numel() * (rank + 1)]
    part[: values.numel()].copy_(values)


def _return_memory() -> None:
    """Return freed heap memory to the system (malloc_trim) after loading; saves a fifth of a small model's peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _float32_copies(optimizer: Any) -> dict[Tensor, Tensor]:
    """Parameter -> float32 copy, for bf16 without ZeRO, which DeepSpeed's accessors do not cover; empty otherwise."""
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {parameter: copy for low, high in groups for parameter, copy in zip(low, high, strict=True)}
