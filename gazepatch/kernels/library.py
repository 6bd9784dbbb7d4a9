"""Functions that launch kernels become operators of torch, `torch.ops.gazepatch.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gazepatch", "FRAGMENT")


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator without gradients; torch.compile takes it as one node.

    `torch.library.custom_op` does more, and takes a tenth of a millisecond a call for it, in every layer and step.

    Args:
        schema: `name(arguments) -> results`, with what is written to marked as in `Tensor(a!)`.
    """

    def made(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for device in ("CPU", "CUDA"):  # interpreted; NVIDIA and AMD
            _LIBRARY.impl(name, function, device)
        return getattr(torch.ops.gazepatch, name).default

    return made


def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Say what an operator gives without running it: shapes and types, for compilers."""
    made: Callable[[Callable[..., Any]], Any] = torch.library.register_fake(f"gazepatch::{name}", lib=_LIBRARY)
    return made
