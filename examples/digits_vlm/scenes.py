"""Boards of real scanned digits, drawn.

A board is a square of cells. Every cell holds one digit of scikit-learn's `load_digits` in one of six colours, the
board has a tint of its own, and noise and clutter lie around. Letters in shapes: `B` sequences, `F` boards (frames) of
a sequence, `n` cells along a side, `P` pixels along a side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from words import COLOURS, NAMES, Board

HELD_OUT = 300


class Digits(NamedTuple):
    """Scanned digits: `images` `[N, 8, 8]` from 0 to 1 and `labels` `[N]`."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Digits:
        """The same on another device."""
        return Digits(self.images.to(device), self.labels.to(device))


@lru_cache
def digits() -> tuple[Digits, Digits]:
    """The digits to train with, and those that only evaluation sees: 300 of the 1797, as many of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    parts = train_test_split(raw.images / 16, raw.target, test_size=HELD_OUT, stratify=raw.target, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Digits(train.float(), train_labels), Digits(test.float(), test_labels)


class Scene(NamedTuple):
    """Drawn boards.

    Attributes:
        pixels: `[B, F, 3, P, P]` of 8 bits, as an image file would hold them.
        digits: `[B, F, n, n]` the digit of each cell.
        colours: `[B, F, n, n]` its colour, an index of `NAMES`.
        tints: `[B, F]` colour of the ground, different in each frame of a sequence.
    """

    pixels: Tensor
    digits: Tensor
    colours: Tensor
    tints: Tensor


def draw(
    board: Board, source: Digits, batch: int, frames: int, generator: torch.Generator, striped: bool = False
) -> Scene:
    """Draw random boards on the generator's device, where `source` must be too.

    Striped boards are for beginners: half of them have equal rows and half equal columns, so that half an address
    finds the answer half of the time, and the whole address always.
    """
    device, n = generator.device, board.cells
    chosen = torch.randint(len(source.labels), (batch, frames, n, n), generator=generator, device=device)
    # Uneven shares of the colours, so that most boards have one that leads.
    shares = torch.rand(batch * frames, len(NAMES), generator=generator, device=device) + 0.05
    colours = shares.multinomial(n * n, replacement=True, generator=generator).view(batch, frames, n, n)
    if striped:
        chosen, colours = _stripe(chosen), _stripe(colours)
    order = torch.rand(batch, len(NAMES), generator=generator, device=device)
    tints = order.argsort(-1)[:, :frames]
    pixels = _paint(board, source.images[chosen.flatten()], colours.flatten(0, 1), tints.flatten(), generator)
    return Scene(pixels.view(batch, frames, *pixels.shape[1:]), source.labels[chosen], colours, tints)


def _stripe(cells: Tensor) -> Tensor:
    """The first row of the first half of `[B, F, n, n]` all over, and the first column of the second half."""
    half = len(cells) // 2
    parts = cells[:half, :, :1].expand_as(cells[:half]), cells[half:, :, :, :1].expand_as(cells[half:])
    return torch.cat(parts)


def _paint(board: Board, glyphs: Tensor, colours: Tensor, tints: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `[B, 3, P, P]` for glyphs `[B * n * n, 8, 8]`, colours `[B, n, n]` and tints `[B]`."""
    device, size = generator.device, board.pixels
    batch = len(tints)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    palette = torch.tensor(list(COLOURS.values()), device=device)
    ground = palette[tints] * uniform(0.15, 0.3, batch, 1)
    canvas = ground[:, :, None, None] + _strokes(board, batch, generator)
    ink = _warp(glyphs, board.cell_tokens * board.patch, generator)
    alpha = _tile(ink.view(batch, board.cells, board.cells, *ink.shape[1:])).unsqueeze(1)
    paint = palette[colours] * uniform(0.75, 1.0, *colours.shape, 1)
    cell = board.cell_tokens * board.patch
    paint = paint.permute(0, 3, 1, 2).repeat_interleave(cell, -1).repeat_interleave(cell, -2)
    canvas = torch.lerp(canvas, paint, alpha)
    specks = uniform(0, 1, batch, 1, size, size) < 0.005
    canvas = torch.where(specks, uniform(0, 1, batch, 1, size, size), canvas)
    noise = torch.randn(canvas.shape, generator=generator, device=device)
    return ((canvas + 0.04 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _warp(glyphs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift digits `[N, 8, 8]` into cells `[N, size, size]`."""
    count, device = len(glyphs), generator.device
    angle, scale, across, down = torch.rand(4, count, generator=generator, device=device).unbind(0)
    angle, scale = (angle - 0.5) * 0.3, 0.78 + 0.2 * scale
    room = 1.05 - scale  # to shift without losing much over the edge
    across, down = (2 * across - 1) * room, (2 * down - 1) * room
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2) / scale[:, None, None]
    shift = -turn @ torch.stack([across, down], -1).unsqueeze(-1)
    grid = F.affine_grid(torch.cat([turn, shift], -1), [count, 1, size, size], align_corners=False)
    return F.grid_sample(glyphs.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _tile(cells: Tensor) -> Tensor:
    """`[B, n, n, s, s]` to `[B, n * s, n * s]`."""
    batch, n, _, s, _ = cells.shape
    return cells.transpose(2, 3).reshape(batch, n * s, n * s)


def _strokes(board: Board, batch: int, generator: torch.Generator, count: int = 4) -> Tensor:
    """Faint grey line segments `[B, 1, P, P]`, about two cells long, which lie under the digits."""
    device, size = generator.device, board.pixels
    start, to = torch.rand(2, batch, count, 2, 1, 1, generator=generator, device=device)
    along = (to - 0.5) * 4 / board.cells
    axis = (torch.arange(size, device=device) + 0.5) / size
    point = torch.stack(torch.meshgrid(axis, axis, indexing="ij")) - start
    nearest = ((point * along).sum(2, keepdim=True) / (along.square().sum(2, keepdim=True) + 1e-6)).clamp(0, 1)
    near = (point - nearest * along).square().sum(2) < (0.7 / size) ** 2
    return 0.25 * near.any(1, keepdim=True).float()
