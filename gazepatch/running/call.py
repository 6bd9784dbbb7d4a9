"""Calls of attention functions, as layers of transformers' models make them, and the functions that models have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attended = tuple[Tensor, Tensor | None]


@dataclass
class Call:
    """A call of the model's own implementation.

    Attributes:
        module: The attention module.
        layer: Its number in the cache; -1 for what is no layer of the decoder.
        query: `[B, H, S, D]`.
        key, value: `[B, H_kv, L, D]`, the sequence in its own order.
        mask: In the form that the implementation takes.
        options: All other arguments.
        latents: What the module made keys and values of (MLA); None elsewhere.
    """

    module: Any
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    latents: tuple[Tensor, Tensor] | None = None


def implementation(name: str, module: nn.Module) -> Callable[..., Attended]:
    """The attention function that transformers has under a name, for this module."""
    # Eager attention is not registered anywhere: each modelling file has its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Attended] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function
