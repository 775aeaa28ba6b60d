"""Distributed training: this file decides between DDP and FSDP2, and Accelerate does it.

sharding=none  DDP: each process holds the whole network and its optimizer state
sharding=full  FSDP2 (`fully_shard`; arXiv 2304.11277): each process holds a part of weights, gradients and
               optimizer state, and gathers one layer at a time

A run of one process needs neither.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from outgrow.model.base.errors import UserError
from outgrow.train.machine.compile import layers_of

if TYPE_CHECKING:
    from outgrow.train.settings import ShardingSettings

_SWITCH = "ACCELERATE_USE_FSDP"


def open_accelerator(sharding: ShardingSettings | None, *, cpu: bool, mixed_precision: str) -> Accelerator:
    """An `Accelerator` that will shard, or not, what it prepares.

    Raises:
        UserError: `accelerate launch` asks for FSDP, which is a setting here.
    """
    if os.environ.get(_SWITCH, "").lower() in {"1", "true"}:
        raise UserError(
            "accelerate launch --use_fsdp: sharding is a setting of the run; launch without it, and give "
            "sharding=full",
        )
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    plugin = (
        sharding_plugin(sharding, mixed_precision)
        if several and sharding is not None and sharding.name == "full"
        else None
    )
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else DDP holds every gradient twice
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        fsdp_plugin=plugin,
        kwargs_handlers=[views],
    )
    # Accelerate has set it for the process, where the next run of a sweep and transformers would find it
    os.environ.pop(_SWITCH, None)
    if plugin is not None and cpu:
        # Accelerate switches FSDP on where it sees accelerators. Its own code, and PyTorch's, run as well
        # over gloo: so that tests on a CPU take the way that GPUs take, it is told here what it would have
        # found out there.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def sharding_plugin(sharding: ShardingSettings, mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """Weights stay float32.

    In bf16 they are gathered and multiplied in bfloat16, and gradients are added up in float32.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=sharding.reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=bf16 if mixed_precision == "bf16" else None,
        cpu_ram_efficient_loading=False,
    )


def prepare(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    unused: bool = False,
) -> tuple[Any, Any]:
    """`objective` and `optimizer`, ready to train on every process.

    Sharding happens in place, layer by layer; DDP wraps.

    Args:
        unused: some parameters get no gradient, which DDP would wait for: it has to look for them after every
            forward pass.
    """
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = unused
    if accelerator.is_fsdp2:
        names = {type(layer).__name__ for layer in layers_of(objective)}
        layers = sorted(names)
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layers
    else:
        objective.to(accelerator.device)  # sharding moves one layer at a time
    return accelerator.prepare(objective, optimizer)


def accumulating(model: nn.Module, accelerator: Accelerator) -> AbstractContextManager[Any]:
    """The context of the backward pass of a micro-batch that is not a step's last (gradient accumulation).

    DDP adds gradients up on each process and exchanges them once. FSDP2 exchanges them each time: it would
    have to hold them whole.
    """
    return nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(model)


def whole_weights(objective: nn.Module, accelerator: Accelerator) -> dict[str, Tensor] | None:
    """The weights put together on process 0, on its CPU; None where they are not sharded.

    Every process has to ask.
    """
    if not accelerator.is_fsdp2:
        return None
    network: Any = objective.network
    weights: dict[str, Any] = get_model_state_dict(
        objective,
        options=StateDictOptions(full_state_dict=True, cpu_offload=True),
    )
    plain = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
    return tied_again(plain, network)


def tied_again(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`weights` with what the network ties as one tensor, so that it is saved once: put together from shards
    there are two of it.
    """
    tied: dict[str, str] = getattr(network, "all_tied_weights_keys", {})
    for name, original in tied.items():
        if name in weights and original in weights:
            weights = weights | {name: weights[original]}
    return weights


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A whole `tensor`, the same on every process, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def gather(tensor: Tensor) -> Tensor:
    """`tensor` put together from all processes' parts, for which every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of `tensors` as one vector, over all processes where they are sharded."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return gather(norm)
