"""Muon for many small matrices: all of one shape in one batch, which is several times faster than one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update has all singular values near one, with the scaling of `torch.optim.Muon`.

    Args:
        matrices: Parameters of two dimensions.
        lr: Rate.
        momentum: Of Nesterov's kind.
        weight_decay: Share of the weights, times `lr`, that goes at each step.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[tuple(matrix.shape)].append(matrix)
            for (rows, columns), matrices in alike.items():
                directions = orthogonal(torch.stack([self._nesterov(m, group["momentum"]) for m in matrices]))
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)

    def _nesterov(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        grad = matrix.grad
        assert grad is not None
        state = self.state[matrix]
        if not state:
            state["mean"] = torch.zeros_like(grad)
        return grad.lerp(state["mean"].lerp_(grad, 1 - momentum), momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Near the orthogonal matrices nearest to `[N, rows, columns]`, by Newton and Schulz' iteration."""
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if wide is not matrices else x
