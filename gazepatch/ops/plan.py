"""The one door to the kernels of decode steps and means: whoever asks here gets them where they can run, or PyTorch."""

from __future__ import annotations

import math

from torch import Tensor

from gazepatch.backend import choose, kernels_fit
from gazepatch.chunk import Chunk
from gazepatch.config import GazeConfig
from gazepatch.ops.decode import DecodePlan
from gazepatch.regions import Regions


def plan_for(regions: Regions, config: GazeConfig, batch: int, heads: int, key_heads: int) -> DecodePlan:
    """How to decode on the device of `regions`, by the backend that the settings ask for.

    Raises:
        ConfigError: The backend cannot run there.
    """
    if choose(config.backend, regions.start.device).name == "torch":
        return DecodePlan(regions, config, batch, heads, key_heads)
    from gazepatch.kernels.plan import KernelPlan  # imports triton

    return KernelPlan(regions, config, batch, heads, key_heads)


def means_of(chunk: Chunk, x: Tensor, config: GazeConfig) -> Tensor:
    """`chunk.means(x)`, by the backend that the settings ask for."""
    fits = kernels_fit({x.dtype}, x.shape[3]) and not x.requires_grad
    if not fits or choose(config.backend, x.device).name == "torch":
        return chunk.means(x)
    from gazepatch.kernels.ops import window_means  # imports triton

    lengths = chunk.regions.log_counts.exp().round().int()
    means: Tensor = window_means(x, (lengths.cumsum(-1) - lengths).int(), lengths, math.prod(config.window_size))
    return means
