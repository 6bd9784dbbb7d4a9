"""Context tokens for tiny models, and how close two results of such models are."""

from __future__ import annotations

import torch
from torch import Tensor

from gazepatch.config import GazeConfig

GAZE = GazeConfig(region=(3, 3, 2), window=(3, 1, 1), budget=0.3, prefill="gaze", min_visual_tokens=0)
COUNT = 4


def context(count: int = COUNT) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


def assert_close(actual: Tensor, expected: Tensor, limit: float = 2e-5) -> None:
    assert actual.shape == expected.shape and expected.isfinite().all()
    error, scale = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item() / 5)
    assert error <= limit * scale, f"differs by {error:.2e} at scale {scale:.1f}"
