"""What is measured: settings of gaze, sizes of sequences and models, and small ones of all for dry runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from gazepatch.config import GazeConfig
from gazepatch.layout import Grid
from gazepatch.score_mod import ScoreMod

PAPER = GazeConfig(window=None, budget=0.1, periphery=False, min_visual_tokens=0)
DEFAULTS = "the defaults"
SETTINGS = {
    "36, paper": replace(PAPER, region=(6, 6, 1)),
    "64, paper": replace(PAPER, region=(8, 8, 1)),
    DEFAULTS: GazeConfig(min_visual_tokens=0),
    "the defaults at 0.1": GazeConfig(min_visual_tokens=0, budget=0.1),
}
#: What the figures that are wanted speak of.
WANTED = ("36, paper", "64, paper")
#: A split-KV kernel that reads everything: ours, with nothing to select.
WHOLE = "our kernel, everything read"
SETTINGS_OF_STEPS = {WHOLE: replace(SETTINGS["64, paper"], budget=1.0), **SETTINGS}


class Shape(NamedTuple):
    """Of a text decoder."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    key_heads: int
    words: int

    @property
    def dim(self) -> int:
        """Of a head."""
        return self.hidden // self.heads


QWEN_7B = Shape(layers=28, hidden=3584, mlp=18944, heads=28, key_heads=4, words=152064)
SMALL = Shape(layers=2, hidden=128, mlp=128, heads=4, key_heads=2, words=1024)


@dataclass(frozen=True)
class Setup:
    """Where and how large to measure.

    Attributes:
        heads, key_heads, dim: Of the attention that is timed alone.
        side: Tokens of an image's or frame's edge.
        sizes: Frames of `side` x `side` tokens, by a name for the size.
        middle: Frames of which the decode kernel reads 32 MB: for its bandwidth alone.
        few: Grids of short sequences.
        batches, model_batches: Rows.
        shape: Of the model.
        prompts: Images of `side` x `side` tokens of a prompt, by a name for the size.
        flex: Whether FlexAttention is timed; it compiles half a minute for a shape.
        compiler: The backend of torch.compile for whole steps.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    dim: int
    side: int
    sizes: dict[str, int]
    middle: dict[str, int]
    few: dict[str, Grid]
    batches: tuple[int, ...]
    model_batches: tuple[int, ...]
    shape: Shape
    prompts: dict[str, int]
    flex: bool
    compiler: str

    @property
    def score_mod(self) -> ScoreMod:
        """Plain dot products."""
        return ScoreMod(self.dim**-0.5)

    def grid(self, frames: int) -> Grid:
        """Of so many frames."""
        return frames, self.side, self.side


def full(device: torch.device) -> Setup:
    """Frames of 24 x 24 tokens, which regions of 6 x 6 and of 8 x 8 divide: 8,064, 32,832 and 131,328 tokens."""
    return Setup(
        device,
        torch.bfloat16,
        heads=32,
        key_heads=8,
        dim=128,
        side=24,
        sizes={"8k": 14, "32k": 57, "128k": 228},
        middle={"78k": 136},
        few={"256": (1, 16, 16), "576": (1, 24, 24), "1152": (2, 24, 24), "2304": (4, 24, 24), "4032": (7, 24, 24)},
        batches=(1, 16),
        model_batches=(1, 8),
        shape=QWEN_7B,
        prompts={"8k": 14, "32k": 57},
        flex=True,
        compiler="inductor",
    )


def tiny(device: torch.device) -> Setup:
    """All that `full` has, so small that it takes seconds, with kernels that are interpreted."""
    return Setup(
        device,
        torch.bfloat16 if device.type == "cuda" else torch.float32,  # which is all that the interpreter gets right
        heads=4,
        key_heads=2,
        dim=32,
        side=8,
        sizes={"8k": 1, "32k": 2, "128k": 3},
        middle={"78k": 2},
        few={"256": (1, 5, 7), "4032": (1, 8, 8)},
        batches=(1, 2),
        model_batches=(1, 2),
        shape=SMALL,
        prompts={"8k": 1, "32k": 2},
        flex=False,
        compiler="aot_eager",
    )
