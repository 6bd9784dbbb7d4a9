"""What a layer's attention makes of its dot products, besides hiding some: passed along where a scale would be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """From dot products to the softmax.

    Attributes:
        scale: Factor of the dot products.
        softcap: Scores become `softcap * tanh(score / softcap)` before anything is added to them (Gemma 2).
        sinks: `[B or 1, H, Q or 1]` scores of one more key, whose value is zero and which no mask hides (gpt-oss).
            They take part in the softmax over what is read, and change no selection: that compares the regions with
            each other, head by head, before heads agree in any way, and what all of them lose to a sink cancels out.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def of(self, products: Tensor) -> Tensor:
        """Scores, in float32, of dot products of any shape."""
        scores = products.float() * self.scale
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def of_queries(self, index: Tensor | slice) -> Scores:
        """The same for some of the queries."""
        if self.sinks is None or self.sinks.shape[2] == 1:
            return self
        return self._replace(sinks=self.sinks[:, :, index])
