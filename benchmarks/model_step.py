"""A whole decode step of a model of Qwen2.5-VL-7B's shape: gaze and dense, on static caches, in CUDA graphs.

Weights, keys and values are random: time does not depend on them. A prompt of 128k tokens would take long, so caches
are filled directly, as a prompt would fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from on_gpu import TEXT, graph_ms
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, StaticCache

from gazepatch.caches.adoption import adopt
from gazepatch.config import GazeConfig
from gazepatch.layout import Grid, Span
from gazepatch.patch import is_patched, patch_of, patched

#: Tokens there is room for behind the prompt: every replay of a graph appends one.
ROOM = 64


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


def model_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A Qwen2.5-VL with random weights, and a vision tower that is not used."""
    third = shape.dim // 8
    text = {
        "vocab_size": shape.words,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 1 << 18,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [shape.dim // 2 - 3 * third, third + third // 2, 2 * third - third // 2],
        },
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": shape.hidden}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def filled(model: Any, grid: Grid, seed: int = 0) -> tuple[StaticCache, int]:
    """A static cache as a prompt with one image or video leaves it, and its tokens."""
    text, visual = model.config.text_config, grid[0] * grid[1] * grid[2]
    tokens = visual + TEXT
    cache = StaticCache(config=text, max_cache_len=tokens + ROOM)
    state = None
    if is_patched(model):
        runtime = patch_of(model).runtime
        state = adopt(cache, runtime, runtime.config, runtime.layers)
        state.begin([Span(0, TEXT // 2, TEXT // 2 + visual, grid, 0)], 1, tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (2, 1, text.num_key_value_heads, tokens, text.hidden_size // text.num_attention_heads)
    for i in range(text.num_hidden_layers):
        entries = torch.empty(shape, dtype=model.dtype, device=model.device).normal_(generator=generator)
        cache.update(*entries, i)
    if state is not None:
        state.finish(True)
    return cache, tokens


def step_of(model: Any, grid: Grid) -> Callable[[], Tensor]:
    """A decode step as `generate` calls it, behind a prompt of one image or video."""
    cache, tokens = filled(model, grid)
    mask = (torch.arange(tokens + ROOM, device=model.device) <= tokens)[None, None, None]
    given = {
        "input_ids": torch.full((1, 1), 5, device=model.device),
        "position_ids": torch.full((3, 1, 1), tokens, device=model.device),
        "attention_mask": {"full_attention": mask},
    }
    return lambda: model(**given, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """How far gaze at full budget is from the unpatched model, in a small one: the largest difference of a logit."""
    model, grid = model_of(SMALL, dtype, device), (2, 12, 12)
    dense = step_of(model, grid)
    expected = [dense() for _ in range(3)]
    with patched(model, GazeConfig(budget=1.0, min_visual_tokens=0)):
        step = step_of(model, grid)
        error = max((step() - logits).abs().max().item() for logits in expected)
    with patched(model, GazeConfig(budget=0.1, min_visual_tokens=0)):
        differs = not torch.allclose(step_of(model, grid)(), expected[0], atol=1e-6)
    if not error < 1e-3 or not differs:
        raise SystemExit(f"a static step is wrong here: at full budget it differs by {error} from the dense one")
    return error


@torch.no_grad()
def model_steps(settings: dict[str, GazeConfig], sizes: dict[str, Grid], device: torch.device) -> Iterator[Any]:
    """A row for every setting and size, in bfloat16."""
    check(device)
    model = model_of(QWEN_7B, torch.bfloat16, device)
    for size, grid in sizes.items():
        dense = graph_ms([step_of(model, grid)])
        for name, config in settings.items():
            with patched(model, replace(config, min_visual_tokens=0)):
                gaze = graph_ms([step_of(model, grid)])
            yield {
                "settings": name,
                "visual": size,
                "budget": config.budget,
                "gaze_ms": gaze,
                "dense_ms": dense,
                "over_dense": dense / gaze,
            }
            torch.cuda.empty_cache()
