"""Layers that keep latents, of which their attention module makes the keys and values of all heads (MLA).

Whatever a module makes of an entry is linear in it. So nothing of what is kept has to be expanded to be read: a query
is taken to where the entries are, reads them as a single key head that is its own value, and the average it comes back
with is expanded, once for all that it read. The mean of a window's entries stands for its mean key and mean value.

Source: the absorbed projections of DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.caches.layer import GazeLayer, Stores
from gazepatch.caches.static import StaticGazeLayer
from gazepatch.ops.decode import Entries

#: Of an attention module: latents `[B, 1, T, r]` and rotated keys `[B, 1, T, d]` to keys and values `[B, H, T, D]`.
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Expansion(NamedTuple):
    """What a module makes of an entry of E numbers, as a matrix for every head.

    Attributes:
        key: `[H, E, D]`.
        value: `[H, E, D_v]`.
    """

    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, expand: Expand, latent: Tensor, rotated: Tensor) -> Expansion:
        """The expansion by a module, for entries of the same widths, type and device as these."""
        widths = [latent.shape[3], rotated.shape[3]]
        identity = torch.eye(sum(widths), dtype=latent.dtype, device=latent.device)[None, None]
        # Through the module's own code, so that adapters of PEFT and quantised weights are in it.
        key, value = expand(*identity.split(widths, 3))
        return cls(key[0], value[0])

    def absorbed(self, query: Tensor) -> Tensor:
        """Queries `[B, H, Q, D]` of expanded keys as `[B, H, Q, E]`, whose products with entries are the same."""
        return torch.einsum("bhqd,hed->bhqe", query, self.key).to(query.dtype)

    def expanded(self, average: Tensor) -> Tensor:
        """Averages of entries `[B, H, Q, E]` as those of their values, `[B, H, Q, D_v]`."""
        return torch.einsum("bhqe,hed->bhqd", average, self.value).to(average.dtype)


class LatentLayer(GazeLayer):
    """Latents of one decoder layer, `[B, 1, T, E]`, each with the part of the keys that is rotated after it.

    To whoever looks into the cache, and to the model, latents are its keys and rotated parts its values.
    """

    def _clear(self) -> None:
        super()._clear()
        self._widths: list[int] = []
        self._expansion: Expansion | None = None

    def _stored(self, key: Tensor, value: Tensor) -> Stores:
        self._widths = [key.shape[3], value.shape[3]]
        return (torch.cat([key, value], 3),)

    def logical(self) -> tuple[Tensor, Tensor]:
        """Latents `[B, 1, L, r]` and rotated parts `[B, 1, L, d]` in the order of the sequence."""
        return self._parts(self._in_order()[0])

    def entries(self) -> Entries:
        """Everything the layer holds, as a routed decode step reads it: one key head, whose keys are its values."""
        assert self._visual is not None and self.mean_keys is not None
        (other,), (visual,) = self._others(), self._visual
        return Entries(other, other, visual, visual, self.mean_keys, self.mean_values)

    def expansion(self, expand: Expand) -> Expansion:
        """The matrices of the layer's module, made once a sequence: as keys of other caches, they are not made anew."""
        kept = not torch.is_grad_enabled()  # a graph is gone after the first backward
        made = self._expansion if kept else None
        if made is None:
            made = Expansion.of(expand, *self._parts(self._others()[0]))
            if kept:
                self._expansion = made = Expansion(*self._placed("expansion", made))
        return made

    def nbytes(self) -> int:
        """Memory of all stores, with the room for new entries, and of the matrices."""
        return super().nbytes() + sum(x.numel() * x.element_size() for x in self._expansion or ())

    def _parts(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        latent, rotated = entries.split(self._widths, 3)
        return latent, rotated


class StaticLatentLayer(StaticGazeLayer, LatentLayer):
    """A `LatentLayer` that takes its memory once; its matrices lie where those of the last sequence did."""
