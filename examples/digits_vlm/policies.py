"""Other ways to choose what a text token reads, to compare gaze with: random, oracle, Quest, FastV and VisionZip.

Each is a function that hides visual tokens from text queries, put in place of the text decoder's attention. They are
written to be read and compared, not to be fast: nothing is skipped, only hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from data import Batch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from words import Board

Attended = tuple[Tensor, None]


@dataclass
class Reading:
    """What a policy knows when a layer asks it.

    Attributes:
        board: Size of the boards.
        share: Of the visual tokens that a text query may read.
        visual: Visual tokens, which are at the positions from 1 on.
        asks: `[B, T]` for every text token, the text token that ends the prompt of its question.
        tower: `[B, V]` attention that each visual token receives in the last layer of the vision tower.
        kept: What a static policy decided, for the layers after.
    """

    board: Board
    share: float
    visual: int
    asks: Tensor
    tower: Tensor
    seed: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def region(self) -> Tensor:
        """`[V]` number of the region, a cell, of each visual token."""
        side, cell = self.board.side, self.board.cell_tokens
        line = torch.arange(side, device=self.asks.device) // cell
        of_frame = (line[:, None] * self.board.cells + line).flatten()
        frame = torch.arange(self.visual // self.board.tokens, device=self.asks.device)
        return (frame[:, None] * self.board.cells**2 + of_frame).flatten()

    def best_regions(self, scores: Tensor) -> Tensor:
        """`[..., V]` whether a visual token is in one of the best regions, by scores `[..., R]`."""
        count = math.ceil(self.share * scores.shape[-1] - 1e-9)
        best = scores.topk(count, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)[..., self.region]

    def best_tokens(self, scores: Tensor) -> Tensor:
        """`[..., V]` whether a visual token is one of the best."""
        best = scores.topk(math.ceil(self.share * scores.shape[-1] - 1e-9), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


#: From a layer's number, its text queries `[B, H_kv, G, T, D]`, all its keys `[B, H_kv, 1, S, D]`, scaled scores
#: `[B, H_kv, G, T, S]` and the reading to `[B or 1, H_kv or 1, 1, T or 1, V]`: what those queries may read.
Policy = Callable[[int, Tensor, Tensor, Tensor, Reading], Tensor]


def random_regions(layer: int, query: Tensor, key: Tensor, scores: Tensor, reading: Reading) -> Tensor:
    """Regions by lot, anew for each layer, head and query."""
    batch, heads, _, tokens, _ = query.shape
    generator = torch.Generator().manual_seed(reading.seed + layer)
    lots = torch.rand(batch, heads, 1, tokens, int(reading.region.max()) + 1, generator=generator)
    return reading.best_regions(lots.to(query.device))


def oracle_regions(layer: int, query: Tensor, key: Tensor, scores: Tensor, reading: Reading) -> Tensor:
    """The regions with most of the true attention, which nobody knows without reading everything."""
    mass = scores.softmax(-1)[..., 1 : 1 + reading.visual].mean(2, keepdim=True)
    total = mass.new_zeros(*mass.shape[:-1], int(reading.region.max()) + 1)
    return reading.best_regions(total.index_add(-1, reading.region, mass))


def quest(layer: int, query: Tensor, key: Tensor, scores: Tensor, reading: Reading) -> Tensor:
    """Regions by the largest score any key in their box of minima and maxima could have.

    Source: Quest, https://arxiv.org/abs/2406.10774; heads of a group agree by the mean of their softmax, as in gaze.
    """
    visual = key[:, :, 0, 1 : 1 + reading.visual]
    shape = (*visual.shape[:2], int(reading.region.max()) + 1, visual.shape[3])
    index = reading.region[None, None, :, None].expand_as(visual)
    low, high = (
        visual.new_zeros(shape).scatter_reduce(2, index, visual, kind, include_self=False) for kind in ("amin", "amax")
    )
    bound = query.clamp(min=0) @ high.mT[:, :, None] + query.clamp(max=0) @ low.mT[:, :, None]
    return reading.best_regions((bound * query.shape[-1] ** -0.5).softmax(-1).mean(2, keepdim=True))


def fastv(layer: int, query: Tensor, key: Tensor, scores: Tensor, reading: Reading) -> Tensor:
    """From the third layer on, the tokens that the end of the question attends to most in the second.

    Source: FastV, https://arxiv.org/abs/2403.06764. Chosen anew for each question, which favours it: in use, what is
    pruned for one question is gone for the next.
    """
    if layer < 2:
        if layer == 1:
            mass = scores.softmax(-1)[..., 1 : 1 + reading.visual].mean((1, 2), keepdim=True)
            asks = reading.asks[:, None, None, :, None].expand(*mass.shape[:3], -1, reading.visual)
            reading.kept[2] = reading.best_tokens(mass).gather(3, asks)
        return scores.new_ones(1, 1, 1, 1, reading.visual, dtype=torch.bool)
    return reading.kept[2]


def visionzip(layer: int, query: Tensor, key: Tensor, scores: Tensor, reading: Reading) -> Tensor:
    """The tokens that receive most attention in the vision tower, whatever is asked.

    Source: the dominant tokens of VisionZip, https://arxiv.org/abs/2412.04467, without its merging of the others.
    """
    return reading.best_tokens(reading.tower)[:, None, None, None]


POLICIES: dict[str, Policy] = {
    "random regions": random_regions,
    "oracle regions": oracle_regions,
    "Quest": quest,
    "FastV": fastv,
    "VisionZip": visionzip,
}


@contextmanager
def reading_by(
    model: LlavaForConditionalGeneration, policy: Policy, board: Board, share: float, batch: Batch
) -> Iterator[None]:
    """A model whose text tokens read by a policy, for one batch."""
    visual = board.tokens * batch.scene.tints.shape[1]
    reading = Reading(board, share, visual, asks(batch), _received(model, batch))

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Attended:
        heads = key.shape[1]
        grouped, keys = query.unflatten(1, (heads, -1)), key[:, :, None]
        scores = grouped @ keys.mT * module.scaling
        length, first = query.shape[2], 1 + visual
        position = torch.arange(length, device=query.device)
        scores = scores.masked_fill(position > position[:, None], -math.inf)
        text = scores[:, :, :, first:]
        kept = policy(module.layer_idx, grouped[:, :, :, first:], keys, text, reading)
        hidden = F.pad(~kept, (1, length - first))
        scores = torch.cat([scores[:, :, :, :first], text.masked_fill(hidden, -math.inf)], 3)
        return (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2).transpose(1, 2), None

    name, config = f"digits_{id(reading):x}", model.model.language_model.config
    before = config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def asks(batch: Batch) -> Tensor:
    """`[B, T]` for every text token, the last token of the prompt of its question; of a prompt's own tokens, itself.

    Answers are read token by token, so what a question's prompt ends with is known when they are written.
    """
    position = torch.arange(batch.text_tokens, device=batch.turn.device).expand_as(batch.turn)
    starts = (batch.turn >= 0) & (F.pad(batch.turn, (1, 0), value=-1)[:, :-1] < 0)
    last_prompt = torch.where(starts, position - 1, -1).cummax(-1).values
    return torch.where(batch.turn >= 0, last_prompt, position)


@torch.no_grad()
def _received(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """`[B, V]` mean attention that each patch receives from all in the last layer of the tower."""
    tower = model.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    caught: list[Tensor] = []
    attention = inner.encoder.layers[-1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    tower(batch.pixel_values().to(model.dtype))
    hook.remove()
    query, key = (
        project(caught[0]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    weights = (query @ key.mT * attention.scale).softmax(-1)
    return weights.mean((1, 2))[:, 1:].reshape(len(batch.ids), -1)
