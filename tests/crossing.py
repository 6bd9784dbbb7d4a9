"""mllama with images of several tiles, and gaze attention by its definition under the unpatched model.

`plainly` puts it there, written here for tiles of 6 x 6 keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from tiny import IMAGE, Case, batch, built, filled
from tiny.crossing import ROOM, SIDE, TILE, seen_after, tiled, tiles_of
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.mllama import processing_mllama
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention, eager_attention_forward

from gazepatch.config import GazeConfig

WHOLE = GazeConfig(region=(3, 3, 1), window=(3, 1, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = replace(WHOLE, budget=0.25)
FAR = replace(QUARTER, periphery=True)
TEXT = ("input_ids", "attention_mask")


# ---- the definition


def regions_of(tile: int) -> list[list[list[int]]]:
    """For every 3 x 3 region of a tile, its windows of three keys above each other."""
    first = tile * TILE + 1
    corners = [(y, x) for y in (0, 3) for x in (0, 3)]
    return [[[first + (y + i) * SIDE + x + j for i in range(3)] for j in range(3)] for y, x in corners]


def attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, config: GazeConfig) -> Tensor:
    """One query `[H, D]` over keys `[H_kv, L, D]`, of which it sees `[L]`."""
    outputs = []
    regions = [r for tile in range(key.shape[1] // TILE) if seen[tile * TILE + 1] for r in regions_of(tile)]
    for k, queries in enumerate(query.unflatten(0, (len(key), -1))):
        means = [[(key[k][w].mean(0), value[k][w].mean(0)) for w in windows] for windows in regions]
        logits = [[scale * queries @ mean + math.log(3) for mean, _ in windows] for windows in means]
        scores = torch.stack([torch.stack(windows).logsumexp(0) for windows in logits]).softmax(0).mean(1)
        chosen = scores.argsort(descending=True, stable=True)[: math.ceil(config.budget * len(regions))].tolist()
        reads, far = seen.clone(), []
        for number, windows in enumerate(regions):
            if number not in chosen:
                reads[list(chain(*windows))] = False
                far += [(x, mean[1]) for x, mean in zip(logits[number], means[number], strict=True)]
        weights = [scale * queries @ key[k][reads].T, *(x[:, None] for x, _ in far if config.periphery)]
        values = [value[k][reads], *(mean[None] for _, mean in far if config.periphery)]
        outputs.append(torch.cat(weights, 1).softmax(1) @ torch.cat(values))
    return torch.cat(outputs)


@contextmanager
def plainly(model: Any, config: GazeConfig, prompts: bool = False) -> Iterator[None]:
    """The unpatched model with plain gaze attention in its cross-attention layers, in decode steps and in `prompts`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        gazes = isinstance(module, MllamaTextCrossAttention) and (prompts or query.shape[2] == 1)
        if not gazes:
            return eager_attention_forward(module, query, key, value, mask, **rest)
        seen = torch.ones(len(query), query.shape[2], key.shape[2], dtype=torch.bool)
        seen = seen if mask is None else (mask[:, 0] == 0).expand_as(seen)
        made = [
            torch.stack([attended(q[:, i], k, v, s[i], rest["scaling"], config) for i in range(q.shape[1])])
            for q, k, v, s in zip(query, key, value, seen, strict=True)
        ]
        return torch.stack(made), None

    name, settings = "plain_gaze", model.model.language_model.config
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    before, settings._attn_implementation_internal = settings._attn_implementation, name
    try:
        yield
    finally:
        settings._attn_implementation_internal = before
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


# ---- prompts


def by_the_processor(ids: Tensor, rows: Any) -> dict[str, Tensor]:
    """The mask as transformers' processor makes it: the words after an image see it up to the next one."""
    sparse = [processing_mllama.get_cross_attention_token_mask(row.tolist(), IMAGE) for row in ids]
    tiles = [[tiles_of(image) for image in row] for row in rows]
    dense = processing_mllama.convert_sparse_cross_attention_mask_to_dense(sparse, tiles, ROOM, ids.shape[1])
    return {"cross_attention_mask": torch.from_numpy(dense)}


def with_rows(*rows: list[Any], mask: Any = seen_after) -> Case:
    """The model with other images; a row without any gets one of nothing, as the processor pads it."""
    case = filled(replace(built("mllama"), rows=[row or [tiled(1, 1)] for row in rows], extra=lambda ids, rows: {}))
    ids, most = case.inputs["input_ids"], max(map(len, rows))
    for number, row in enumerate(rows):
        if not row:
            ids[number, ids[number] == IMAGE] = 5
            case.inputs["pixel_values"][number] = 0
            case.inputs["aspect_ratio_ids"][number] = 0
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert case.inputs[name].shape[1] == most
    case.inputs.update(mask(ids, rows))
    return case


CASES: dict[str, Callable[[], Case]] = {
    "two images": lambda: built("mllama"),
    "the last of two images": lambda: with_rows([tiled(7, 3), tiled(2, 2)], mask=by_the_processor),
    "all tiles": lambda: with_rows([tiled(6, 4)]),
    "different numbers of images": lambda: batch(built("mllama")),
    "a row without an image": lambda: with_rows([], [tiled(2, 2)]),
}


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= 2e-5 * max(1.0, expected.abs().max().item()), error


# ---- conversations


class Talk:
    """A conversation by hand on one cache: `say` returns the logits of its tokens."""

    def __init__(self, case: Case, cache: Cache | None = None) -> None:
        self.case, self.cache = case, DynamicCache() if cache is None else cache
        self.ids = torch.zeros(1, 0, dtype=torch.long)

    @torch.no_grad()
    def say(self, ids: Tensor, images: Any = (), mask: Tensor | None = None) -> Tensor:
        self.ids = torch.cat([self.ids, ids], 1)
        pixels = {}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask") if images else ():
            pixels[name] = torch.cat([image.inputs[name] for image in images])[None]
        seen = {} if mask is None else {"cross_attention_mask": mask[:, : self.ids.shape[1]]}
        attention = torch.ones_like(self.ids)
        model = self.case.model
        return model(input_ids=ids, attention_mask=attention, past_key_values=self.cache, **pixels, **seen).logits


def talk(case: Case, cache: Cache | None = None, steps: int = 2) -> Tensor:
    """Two turns with an image each, and single tokens after both."""
    images, said = [tiled(2, 2), tiled(7, 3)], Talk(case, cache)
    turns = [torch.tensor([[1, 5, IMAGE, 6, 7]]), torch.tensor([[8, IMAGE, 9, 10, 11]])]
    whole = torch.cat([part for turn in turns for part in (turn, torch.full((1, steps), 20))], 1)
    mask = seen_after(whole, [images])["cross_attention_mask"]
    logits = []
    for number, turn in enumerate(turns):
        seen = mask[:, :, : number + 1]
        logits.append(said.say(turn, images[number : number + 1], seen))
        logits += [said.say(torch.tensor([[20]]), (), seen) for _ in range(steps)]
    return torch.cat(logits, 1)
