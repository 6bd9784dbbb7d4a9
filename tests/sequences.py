"""Sequences that a layer reads turn by turn and then decodes token by token: sketches, settings, and the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.ops.decode import Decoded
from gazepatch.score_mod import ScoreMod

BASE = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.3, min_visual_tokens=0)

#: One turn each: rows of text tokens (numbers) and images (t, h, w), (t, h, w, row gap) or (tokens,) without a grid
LAYOUTS: dict[str, list[list[Any]]] = {
    "one token": [[3, (1, 1, 1), 1]],
    "35": [[2, (1, 5, 7), 1]],
    "36 without text": [[(1, 6, 6)]],
    "63 and much text": [[35, (1, 7, 9), 63]],
    "100": [[1, (1, 10, 10), 36]],
    "divisible": [[2, (1, 8, 8), 1, (1, 4, 12), 1]],
    "several, text between": [[3, (1, 6, 6), 1, (1, 5, 7), 5, (1, 1, 1), 2]],
    "several, adjacent": [[(1, 5, 7), (1, 6, 6), (1, 7, 3), 2]],
    "video": [[2, (3, 5, 7), 2]],
    "row gaps": [[1, (1, 5, 7, 1), 2, (1, 3, 6, 1), 1]],
    "no grid": [[1, (63,), 2, (1,), 1]],
    "rows alike": [[2, (1, 5, 7), 3, (1, 4, 4), 1]] * 3,
    "rows of different images": [[5, (1, 6, 6), 2], [(1, 5, 7), 1, (1, 7, 9), 2], [1, (3, 4, 3), 4]],
    "a row without an image": [[9], [2, (1, 6, 7), 1]],
    "rows of one count and two sizes": [[1, (1, 8, 8), 1], [4, (1, 7, 7), 1]],
    "padding before rows alike": [[1, (1, 6, 6), 2], [4, (1, 6, 6), 1]],
}

#: Several turns each.
TURNS: dict[str, list[list[list[Any]]]] = {
    "another image": [[[2, (1, 6, 6), 1]], [[3, (1, 5, 7), 2]]],
    "an image after text": [[[2, (1, 6, 6), 1]], [[5]], [[1, (1, 5, 7)]]],
    "rows alike": [[[2, (1, 6, 6), 1]] * 2, [[3, (1, 5, 7), 2]] * 2],
    "rows alike, then not": [[[2, (1, 6, 6), 1]] * 2, [[3, (1, 5, 7), 2], [(1, 4, 4), 1, (1, 8, 3), 1]]],
    "rows not alike, then alike": [[[3, (1, 5, 7), 2], [(1, 4, 4), 1, (1, 8, 3), 1]], [[2, (1, 6, 6), 1]] * 2],
    "images in one row, then in the other": [[[3, (1, 5, 7), 2], [4]], [[6], [(1, 8, 8), 2]]],
}

#: What to change in `BASE`.
SETTINGS: dict[str, dict[str, Any]] = {
    "share": {},
    "share, no periphery": {"periphery": False},
    "number": {"budget": 2},
    "number, no periphery": {"budget": 1, "periphery": False},
    "paper": {"window": None, "budget": 0.125, "periphery": False},
    "windows of one token": {"region": (3, 3, 2), "window": (1, 1, 1)},
    "flat windows through time": {"region": (2, 4, 2), "window": (1, 4, 1)},
    "max": {"head_reduce": "max"},
    "none": {"head_reduce": "none"},
    "none, no periphery": {"head_reduce": "none", "periphery": False, "budget": 2},
    "few tokens": {"min_visual_tokens": 1000},
    "few tokens in some rows": {"min_visual_tokens": 40},
    "everything": {"budget": 1.0},
    "more than everything": {"budget": 1000},
}


def biases(sequence: Any) -> Tensor:
    """`[B, H, L, L]`, some so much smaller than others that their sum has to be taken with care."""
    rows, heads, length, _ = sequence.query.shape
    return 2 * torch.randn(rows, heads, length, length) - 150.0 * (torch.rand(length) < 0.2)


#: What attention may be beyond a softmax of scaled dot products.
MORE: dict[str, Callable[[Any], Any]] = {
    "soft cap": lambda sequence: replace(sequence, softcap=0.7),
    "sinks": lambda sequence: replace(sequence, sinks=3 * torch.randn(1, sequence.query.shape[1], 1)),
    "sinks of queries": lambda sequence: replace(sequence, sinks=3 * torch.randn(sequence.query.shape[:3])),
    "biases": lambda sequence: replace(sequence, bias=biases(sequence)),
    "soft cap and sinks": lambda sequence: replace(MORE["sinks"](sequence), softcap=0.7),
}


class Filled:
    """A layer that has read `sequence` up to `stop`, turn by turn and then token by token, as a model would."""

    def __init__(self, sequence: Any, config: GazeConfig) -> None:
        self.sequence, self.config = sequence, config
        self.owner = torch.nn.Module()
        self.state = GazeState(self.owner, config)
        self.layer = GazeLayer(self.state, gazes=True, leads=True)

    def read(self, start: int, stop: int) -> None:
        """A forward over these positions."""
        self.begin(start, stop)
        self.state.finish(completed=True)

    def begin(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        sequence = self.sequence
        spans = [span for span in sequence.spans if start <= span.start < stop]
        self.state.begin(spans, sequence.rows, stop - start)
        return self.layer.update(sequence.key[:, :, start:stop], sequence.value[:, :, start:stop])

    def decode(self, position: int, mask: Tensor | None = None) -> Decoded:
        """The decode step at `position`; by plain attention, where a sequence has too few visual tokens to gaze."""
        key, value = self.begin(position, position + 1)
        at = slice(position, position + 1)
        query, score_mod = self.sequence.query[:, :, at], self.sequence.score_mod(at, position + 1)
        if self.state.decoding:
            entries, bias = self.layer.entries(), self.state.bias(mask, query.device)
            decoded = self.state.plan(query, entries).decode(query, entries, self.state.laid(score_mod), bias)
        else:
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
            assert score_mod == ScoreMod(score_mod.scale)
            output = sdpa(query, key, value, attn_mask=mask, scale=score_mod.scale)
            decoded = Decoded(output, -1)
        self.state.finish(completed=True)
        return decoded


def steps(filled: Filled) -> Iterator[tuple[int, Decoded]]:
    """Reads the turns and decodes the tokens between them, and gives every decode step."""
    sequence = filled.sequence
    ends = [*sequence.starts[1:], sequence.key.shape[2]]
    for start, stop, end in zip(sequence.starts, sequence.stops, ends, strict=True):
        filled.read(start, stop)
        for position in range(stop, end):
            yield position, filled.decode(position, sequence.mask(position))


def separated(sequence: Any, config: GazeConfig) -> Any:
    """The same sequence with keys by which no two regions are so close that low precision could swap them."""
    key, query = sequence.key.clone(), sequence.query.clone()
    query[..., 0] = 4
    filled = Filled(sequence, config)
    filled.read(0, sequence.stops[0])
    filled.begin(sequence.stops[0], sequence.stops[0] + 1)
    region_of = filled.state.region_of().expand(sequence.rows, -1)
    for row in range(sequence.rows):
        ranks = torch.randperm(int(region_of.max()) + 1).float()
        # Half a unit of logit apart, by the feature that all queries agree on.
        key[row, :, :, 0] = torch.where(region_of[row] < 0, 0.0, ranks[region_of[row].clamp(min=0)] / 2)
    key[..., 1:] /= 4
    return replace(sequence, key=key, query=query)
