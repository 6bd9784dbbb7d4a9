"""Models that FSDP2 spreads over processes: what may be asked of it, and whole tensors out of shards and back.

Every process keeps a shard of each parameter and gathers the whole of a layer while it runs. See
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from gazepatch.errors import ConfigError


def fsdp_wanted(arguments: TrainingArguments) -> bool:
    """Whether a training is to spread its model, by its arguments or by `accelerate launch --use_fsdp`.

    Raises:
        ConfigError: It cannot be done so.
    """
    if not (arguments.fsdp or _environment("ACCELERATE_USE_FSDP")):
        return False
    asked = arguments.fsdp_plugin_args or {}
    if int(asked.get("fsdp_version", os.environ.get("FSDP_VERSION", 1))) != 2:
        raise ConfigError(
            "fsdp must be FSDP2, which keeps the parameters of a layer apart as they are: give "
            "fsdp_config={'version': 2}, or accelerate launch --fsdp_version 2"
        )
    if asked.get("activation_checkpointing", _environment("FSDP_ACTIVATION_CHECKPOINTING")):
        raise ConfigError(
            "fsdp's activation_checkpointing runs layers again that do not know then where they gaze: leave it out "
            "and give gradient_checkpointing=true"
        )
    if asked.get("cpu_ram_efficient_loading", _environment("FSDP_CPU_RAM_EFFICIENT_LOADING")):
        raise ConfigError(
            "fsdp's cpu_ram_efficient_loading leaves all processes but the first without weights, which context "
            "tokens are made from: leave it out"
        )
    if arguments.world_size < 2:
        raise ConfigError("fsdp spreads a model over processes, got one: start it with torchrun --nproc-per-node N")
    if str(arguments.distributed_state.distributed_type).endswith("MULTI_CPU"):
        raise ConfigError("fsdp is for GPUs, accelerate spreads no model over processes on a CPU: leave it out")
    return True


def layer_classes(decoder: nn.Module) -> list[str]:
    """Names of the classes of a text decoder's layers.

    They alone are gathered one by one. Everything else, a vision tower too, is gathered for a whole pass: a process
    whose records have no image skips the tower, and the others would wait for it there.
    """
    layers: Any = decoder.layers
    return sorted({type(layer).__name__ for layer in layers})


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Spread a model that learns nothing over all processes, in place."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, sharded or not, a value that every process has the whole of."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def _environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
