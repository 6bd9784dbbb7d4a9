"""The definition of gaze attention, in float64 and one query at a time. Every fast path is compared with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.layout import Span
from gazepatch.tiling import tile_span

Score = Callable[[Tensor, Tensor], Tensor]


class Attended(NamedTuple):
    """`output` `[H, D_v]` float32, and whether each query head reads each entry, `kept` `[H, L]` bool."""

    output: Tensor
    kept: Tensor


def gaze_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Span],
    config: GazeConfig,
    scale: float,
    visible: Tensor,
    softcap: float = math.inf,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    key_heads: int | None = None,
) -> Attended:
    """Gaze attention of one text query.

    Args:
        query: `[H, D]`, after position embedding and norm.
        key, value: `[H_kv, L, D]`, the whole sequence in its own order, as cached.
        spans: The visual tokens that the query sees: leave out those that end after it.
        config: Region, window, budget, head_reduce, periphery and min_visual_tokens are read.
        scale: Scale of the attention scores.
        visible: `[L]` bool, the entries that the query could read before.
        softcap: Bound of the scores; infinite: none.
        sinks: `[H]` scores of one more key, whose value is zero.
        bias: `[H, L]`, added to the scores of the keys.
        key_heads: Heads of the cache, whose query heads share a selection: fewer than H_kv where keys are made of
            latents.

    Source: https://arxiv.org/abs/2605.13080.
    """
    per_key = len(query) // len(key)
    group = len(query) // (key_heads or len(key))
    query, key, value = query.double(), *(x.double().repeat_interleave(per_key, 0) for x in (key, value))
    score = functools.partial(_score, scale=scale, softcap=softcap)
    bias = key.new_zeros(key.shape[:2]) if bias is None else bias.double()
    regions = _regions(spans, config)
    logits = score(query, key) + bias
    window_logits = [[_window_logit(query, key, w, score, bias) for w in windows] for windows in regions]
    scores = _region_scores(window_logits, len(query))
    whole = sum(span.tokens for span in spans) < config.min_visual_tokens
    outputs, kept = [], []
    for h in range(len(query)):
        of_group = scores[h // group * group :][:group]
        of_head = scores[h] if config.head_reduce == "none" else _agree(of_group, config.head_reduce)
        chosen = set(range(len(regions))) if whole else _best(of_head, config.budget_regions(len(regions)))
        far = [number for number in range(len(regions)) if number not in chosen]
        read = visible.clone()
        for number in far:
            read[torch.cat(regions[number])] = False
        kept.append(read)
        weights, values = [logits[h][read]], [value[h][read]]
        if config.periphery:
            for number in far:
                weights += [logit[h : h + 1] for logit in window_logits[number]]
                values += [value[h][window].mean(0, keepdim=True) for window in regions[number]]
        if sinks is not None:
            weights.append(sinks[h : h + 1].double())
            values.append(value.new_zeros(1, value.shape[2]))
        outputs.append(torch.cat(weights).softmax(0) @ torch.cat(values))
    return Attended(torch.stack(outputs).float(), torch.stack(kept))


def _regions(spans: Sequence[Span], config: GazeConfig) -> list[list[Tensor]]:
    """For every region, the positions of the tokens of each of its windows."""
    regions = []
    for span in spans:
        tiling, positions = tile_span(span, config), torch.tensor(span.positions())
        in_order = positions[tiling.order]
        for region in range(len(tiling.lengths)):
            numbers = range(region * tiling.windows.shape[1], (region + 1) * tiling.windows.shape[1])
            windows = [in_order[tiling.slot_windows == number] for number in numbers]
            regions.append([window for window in windows if len(window)])
    return regions


def _score(query: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    """`[H, n]` for `[H, D]` and `[H, n, D]`."""
    scores = scale * (keys @ query[:, :, None])[:, :, 0]
    return scores if softcap == math.inf else softcap * torch.tanh(scores / softcap)


def _window_logit(query: Tensor, key: Tensor, window: Tensor, score: Score, bias: Tensor) -> Tensor:
    """`[H]`."""
    # Without biases that is the score of the mean key + log n.
    return (score(query, key[:, window].mean(1, keepdim=True)) + bias[:, window]).logsumexp(1)


def _region_scores(window_logits: list[list[Tensor]], heads: int) -> Tensor:
    """`[H, R]` float32: shares that are too small for it are equal, whoever computes them."""
    logits = [torch.stack(of_region).logsumexp(0) for of_region in window_logits]
    return torch.stack(logits, 1).softmax(1).float() if logits else torch.zeros(heads, 0)


def _agree(scores: Tensor, head_reduce: str) -> Tensor:
    return scores.amax(0) if head_reduce == "max" else scores.mean(0)


def _best(scores: Tensor, count: int) -> set[int]:
    values: list[float] = scores.tolist()
    order = sorted(range(len(values)), key=lambda number: (-values[number], number))
    return set(order[:count])
