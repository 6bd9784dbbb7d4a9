"""Functions that launch kernels become operators of torch, `torch.ops.gazepatch.*`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_LIBRARY = torch.library.Library("gazepatch", "FRAGMENT")


def watched() -> bool:
    """Whether somebody looks at what torch does: a compiler, or a dispatch mode."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function an operator without gradients; torch.compile takes it as one node.

    `torch.library.custom_op` does more, and takes a tenth of a millisecond a call for it, in every layer and step. Even
    the way through torch's dispatcher takes some 5 us, and is left out where nobody looks on.

    Args:
        schema: `name(arguments) -> results`, with what is written to marked as in `Tensor(a!)`.
    """

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for device in ("CPU", "CUDA"):  # interpreted; NVIDIA and AMD
            _LIBRARY.impl(name, function, device)
        registered = getattr(torch.ops.gazepatch, name).default

        @functools.wraps(function)
        def called(*args: Any) -> Any:
            return (registered if watched() else function)(*args)

        return called

    return made


def fake(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Say what an operator gives without running it: shapes and types, for compilers."""
    made: Callable[[Callable[..., Any]], Any] = torch.library.register_fake(f"gazepatch::{name}", lib=_LIBRARY)
    return made
