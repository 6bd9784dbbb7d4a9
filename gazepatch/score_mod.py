"""What a layer's attention makes of its dot products, besides hiding some: passed along where a scale would be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.regions import ABSENT


class ScoreMod(NamedTuple):
    """From dot products to the softmax.

    Attributes:
        scale: Factor of the dot products.
        softcap: Scores become `softcap * tanh(score / softcap)` before anything is added to them (Gemma 2).
        sinks: `[B or 1, H, Q or 1]` scores of one more key, whose value is zero and which no mask hides (gpt-oss).
            They take part in the softmax over what is read, and change no selection: that compares the regions with
            each other, head by head, before heads agree in any way, and what all of them lose to a sink cancels out.
        bias: `[B or 1, H, Q, L]` float32, added to the score of each key (Inkling), by its position; for a decode step
            sorted as it reads: other entries, then the visual store (`GazeState.laid`).
        window_bias: `[B or 1, H, Q, R * C]` float32, what the biases do to the score of a window: their log-sum-exp
            over its tokens, in place of `log n`. So a window still weighs what it would if its keys were all alike.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    window_bias: Tensor | None = None

    def of(self, products: Tensor) -> Tensor:
        """Scores, in float32 or more, of dot products of any shape."""
        scores = products.to(at_least_single(products.dtype)) * self.scale
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def of_queries(self, index: Tensor | slice) -> ScoreMod:
        """The same for some of the queries."""
        if self.sinks is None and self.bias is None:
            return self
        sinks = self.sinks if self.sinks is None or self.sinks.shape[2] == 1 else self.sinks[:, :, index]
        bias, windows = (None if x is None else x[:, :, index] for x in (self.bias, self.window_bias))
        return self._replace(sinks=sinks, bias=bias, window_bias=windows)

    def grouped(self, key_heads: int, queries: int) -> ScoreMod:
        """The same for queries `[B, H_kv, Q * G, D]`, the heads of a query next to each other: `[B, H_kv, Q * G, ..]`.

        Args:
            key_heads: H_kv.
            queries: Q.
        """
        if self.sinks is None and self.bias is None:
            return self

        def grouped(x: Tensor) -> Tensor:
            x = x.float().unflatten(1, (key_heads, -1)).transpose(2, 3)
            return x.expand(-1, -1, queries, *x.shape[3:]).flatten(2, 3)

        sinks, bias, windows = (None if x is None else grouped(x) for x in (self.sinks, self.bias, self.window_bias))
        return self._replace(sinks=sinks, bias=bias, window_bias=windows)


def as_bias(mask: Tensor) -> Tensor:
    """A mask of any shape, boolean (True: visible) or to be added, as what is added to scores: float32."""
    if mask.dtype == torch.bool:
        # Not by where, which would take the default type: float16 cannot say ABSENT.
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, ABSENT)
    # The least number of its type hides, which in float16 is not that little.
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, ABSENT).clamp(min=ABSENT)


def visible(mask: Tensor) -> Tensor:
    """A mask, boolean or to be added to scores, as booleans."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def added(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The sum of what is added to scores."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return mask + bias


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision to work in with tensors of this one."""
    return dtype if dtype == torch.float64 else torch.float32
