"""Memory that is written to again: where it lies from prompt to prompt, as CUDA graphs ask, and when it may be."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


def mark_static(memory: Tensor) -> Tensor:
    """Tell a compiler that this tensor will not move: only then does it record steps that write to it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(memory)
    return memory


def locked(memory: Tensor) -> bool:
    """Whether memory that was taken in inference mode is used outside of it, where torch lets nobody write to it."""
    return memory.is_inference() and not torch.is_inference_mode_enabled()


class StableBuffers:
    """Where tensors lie that are made anew for every prompt."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Tensor] = {}

    def keep(self, name: Hashable, new: Tensor) -> Tensor:
        """`new`, where the last one of its name lies, if that took as much."""
        held = self._held.get(name)
        if held is new:
            return new
        if held is not None and (held.shape, held.dtype, held.device) == (new.shape, new.dtype, new.device):
            return held.copy_(new)
        self._held[name] = mark_static(new)
        return new
