"""Single precision for weights that learn: an update is so small beside them that fewer bits would round it away."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Hold all of a model in single precision, in place; returns the types that it had, by name."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.float()
    return dtypes


def narrow(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give what `widen` named its type back, in place; what has come since stays as it is."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
