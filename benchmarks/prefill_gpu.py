"""How long a whole prompt takes, unpatched and patched, with a model of Qwen2.5-VL-7B's shape and random weights.

The forward is the multimodal model's own, with token ids, grids of images and a new `DynamicCache`, so that all that
the patch does on the host is in it: finding the spans, sorting the tokens into regions, filling its cache, the means of
the windows. Left out on both sides: the vision tower, which gives features that are made before, and position ids,
which `generate` makes outside of the forward. Both would only make the share of the patch smaller.

All sides run in turn within a round, and shares are medians of the rounds' own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from attention_tables import Case
from model_step import Models
from on_gpu import TEXT, elapsed_ms, free, lacking
from shapes import Setup
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gazepatch.config import GazeConfig
from gazepatch.patch import patched

#: Sides by name; None is the unpatched model.
SIDES: Mapping[str, GazeConfig | None] = {
    "dense": None,
    "patched": GazeConfig(min_visual_tokens=0),
    "routed": GazeConfig(min_visual_tokens=0, prefill="gaze"),
}

Row = dict[str, Any]


def prompt(config: Any, images: int, side: int, device: torch.device) -> dict[str, Any]:
    """Text, so many images of `side` x `side` tokens, and text."""
    text, merge = [5] * (TEXT // 2), config.vision_config.spatial_merge_size
    image = [config.vision_start_token_id, *[config.image_token_id] * side * side, config.vision_end_token_id]
    ids = torch.tensor([[*text, *image * images, *text]])
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "mm_token_type_ids": (ids == config.image_token_id).int().to(device),
        "position_ids": torch.arange(ids.shape[1], device=device).expand(3, 1, -1),
        "pixel_values": torch.zeros(1, 1, device=device),
        "image_grid_thw": torch.tensor([[1, side * merge, side * merge]] * images, device=device),
    }


@contextmanager
def without_tower(model: Any, features: Tensor) -> Iterator[None]:
    """Let the vision tower give `features` `[tokens, hidden]`, whatever it gets."""
    tower = model.model.visual
    tower.forward = lambda *_, **__: BaseModelOutputWithPooling(last_hidden_state=None, pooler_output=features)
    try:
        yield
    finally:
        del tower.forward


def forward_of(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The forward of a prompt as `generate` calls it: logits of the last token, and a cache that is thrown away."""
    return lambda: model(**inputs, use_cache=True, logits_to_keep=1).logits


@torch.no_grad()
def rounds_of(
    model: Any, inputs: Mapping[str, Any], features: Tensor, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of every side in every round."""
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    call = forward_of(model, inputs)
    with without_tower(model, features):
        for turn in range(warmup + rounds):
            for name, config in SIDES.items():
                with nullcontext() if config is None else patched(model, config):
                    ms = elapsed_ms(call)
                if turn >= warmup:
                    taken[name].append(ms)
    return taken


def summarised(taken: Mapping[str, list[float]]) -> Row:
    """Medians, and what a patched side adds to the dense one of its own round."""
    row: Row = {f"{name}_ms": statistics.median(times) for name, times in taken.items()}
    for name, column in (("patched", "overhead"), ("routed", "routed_overhead")):
        shares = [ours / theirs - 1 for ours, theirs in zip(taken[name], taken["dense"], strict=True)]
        row |= {column: statistics.median(shares), f"{column}_least": min(shares), f"{column}_most": max(shares)}
    return row | {"rounds": len(taken["dense"])}


def no_room(setup: Setup, images: int) -> str | None:
    """Why a prompt does not fit: two caches for a moment, and the activations of an MLP twice."""
    each = 4 * setup.shape.layers * setup.shape.key_heads * setup.shape.dim + 6 * setup.shape.mlp
    tokens = images * setup.side**2 + TEXT
    return lacking(tokens * each * setup.dtype.itemsize, setup.device, "the activations of a prompt")


Run = Callable[[Any, dict[str, Any], Tensor], Row]


def prompts(setup: Setup, models: Models, run: Run) -> Iterator[Case]:
    """A row for every size: what `run` says of the model, the inputs and the features of the images."""
    for size, images in setup.prompts.items():

        def measure(images: int = images) -> Row:
            model = models.model
            if reason := no_room(setup, images):
                return {"skipped": reason}
            inputs = prompt(model.config, images, setup.side, setup.device)
            features = torch.randn(images * setup.side**2, setup.shape.hidden, device=setup.device).to(setup.dtype)
            try:
                return {"visual_tokens": images * setup.side**2, "images": images, **run(model, inputs, features)}
            finally:
                free()

        yield Case({"visual": size}, measure)


def prefill(setup: Setup, models: Models) -> Iterator[Case]:
    """A row for every size."""
    rounds, warmup = (11, 2) if setup.device.type == "cuda" else (1, 0)
    return prompts(setup, models, lambda *given: summarised(rounds_of(*given, rounds, warmup)))
