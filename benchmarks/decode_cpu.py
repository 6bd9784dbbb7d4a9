"""What gaze attention costs and saves on a CPU: `python benchmarks/decode_cpu.py [--quick] [--json] [-o FILE]`.

Each line compares ways of doing the same in one run, interleaved, and gives medians and ratios. The keys and values are
random: time does not depend on them. Filling a cache of 64k tokens by a real prompt would take minutes, so the caches
of the attention and decode tables are filled directly, as a prompt would fill them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from timing import machine, ratio, side_by_side  # isort: skip  # before torch: it sets the environment

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gazepatch.caches.adoption import adopt
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.name import CACHE
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan, gaze_decode
from gazepatch.patch import apply, is_patched, patch_of, restore
from gazepatch.score_mod import ScoreMod

HEADS, KEY_HEADS, DIM, TEXT, LAYERS = 32, 8, 128, 64, 4
SETTINGS = {
    "64": GazeConfig(region=(8, 8, 1), window=None, periphery=False, min_visual_tokens=0),
    "36": GazeConfig(region=(6, 6, 1), window=None, periphery=False, min_visual_tokens=0),
    "36 in 3x3, periphery": GazeConfig(min_visual_tokens=0),
    "the defaults": GazeConfig(),
}
BUDGETS = {
    "64": (0.05, 0.1, 0.25, 1.0),
    "36": (0.1, 0.25),
    "36 in 3x3, periphery": (0.1,),
    "the defaults": (GazeConfig().budget,),
}

Stored = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class Owner:
    """Stands for the patch that a cache belongs to."""


class Attention(nn.Module):
    """What transformers' attention function asks of a module."""

    num_key_value_groups, is_causal = HEADS // KEY_HEADS, True


def span(side: int) -> Span:
    """An image of `side` x `side` tokens after half of the text."""
    return Span(0, TEXT // 2, TEXT // 2 + side * side, (1, side, side), 0)


# ---- one attention step


class Layers:
    """The entries of a few layers in one gaze cache, to be read at several budgets."""

    def __init__(self, stored: Stored, side: int, config: GazeConfig, budgets: Sequence[float]) -> None:
        self.owner = Owner()
        self.state = GazeState(self.owner, config)
        self.layers = [GazeLayer(self.state, gazes=True, leads=i == 0) for i in range(len(stored))]
        self.state.begin([span(side)], 1, stored[0][0].shape[2])
        for layer, (key, value) in zip(self.layers, stored, strict=True):
            layer.update(key, value)
        self.state.finish(True)
        self.plans = {}
        if self.state.regions is not None:  # else there are fewer tokens than min_visual_tokens
            for budget in budgets:
                self.plans[budget] = DecodePlan(self.state.regions, replace(config, budget=budget), 1, HEADS, KEY_HEADS)

    def gaze(self, query: Tensor, new: Tensor, budget: float) -> None:
        """Append one token to every layer and attend, as a patched model does."""
        self.state.begin([], 1, 1)
        for layer in self.layers:
            key, value = layer.update(new, new)
            if self.plans:
                gaze_decode(query, layer.entries(), self.plans[budget], ScoreMod(DIM**-0.5))
            else:
                sdpa_attention_forward(ATTENTION, query, key, value, None, scaling=DIM**-0.5)
        self.state.finish(True)


def grouped(stored: Stored, query: Tensor) -> None:
    """Dense attention with the query heads of a key head in the rows of one product."""
    for key, value in stored:
        sdpa(query.view(1, KEY_HEADS, HEADS // KEY_HEADS, DIM), key, value)


def enable_gqa(stored: Stored, query: Tensor) -> None:
    """Dense attention as torch offers it for grouped heads."""
    for key, value in stored:
        sdpa(query, key, value, enable_gqa=True)


def default(stored: Stored, query: Tensor, new: Tensor) -> None:
    """Append one token to layers of a DynamicCache and attend, as an unpatched model does."""
    for key, value in stored:
        plain = DynamicLayer()
        plain.lazy_initialization(key, value)
        plain.keys, plain.values = key, value
        sdpa_attention_forward(ATTENTION, query, *plain.update(new, new), None, scaling=DIM**-0.5)


ATTENTION = Attention()


@torch.no_grad()
def attention_step(side: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Appending one token and attending, over several layers in turn, so that entries come from memory as in a model.

    Beside it the best dense sdpa, which is spared the append, and transformers' default path.
    """
    shape = (2, 1, KEY_HEADS, side * side + TEXT, DIM)
    stored: Stored = [(key, value) for key, value in (torch.randn(shape).to(dtype) for _ in range(LAYERS))]
    layers = {name: Layers(stored, side, config, BUDGETS[name]) for name, config in SETTINGS.items()}
    new = torch.randn(1, KEY_HEADS, 1, DIM).to(dtype)
    # A new query for every step, so that it reads other regions than the one before.
    queries = itertools.cycle(torch.randn(32, 1, HEADS, 1, DIM).to(dtype))
    ways: dict[Any, Callable[[], object]] = {
        "heads grouped": lambda: grouped(stored, next(queries)),
        "enable_gqa": lambda: enable_gqa(stored, next(queries)),
        "transformers": lambda: default(stored, next(queries), new),
    }
    gazes = [(name, budget) for name in SETTINGS for budget in BUDGETS[name]]
    ways |= {way: lambda way=way: layers[way[0]].gaze(next(queries), new, way[1]) for way in gazes}
    taken = side_by_side(ways, rounds, seconds=60)
    best = min(("heads grouped", "enable_gqa"), key=lambda name: statistics.median(taken[name]))
    per_layer = {name: statistics.median(times) / LAYERS for name, times in taken.items()}
    return [
        {
            "regions": name,
            "visual_tokens": side * side,
            "dtype": str(dtype).removeprefix("torch."),
            "budget": budget,
            "gaze_ms": per_layer[name, budget],
            "best_dense_ms": per_layer[best],
            "best_dense": best,
            "transformers_ms": per_layer["transformers"],
            "over_best_dense": ratio(taken[best], taken[name, budget]),
            "over_transformers": ratio(taken["transformers"], taken[name, budget]),
        }
        for name, budget in gazes
    ]


# ---- a whole decode step


def llava(
    layers: int,
    side: int,
    dtype: torch.dtype,
    hidden: int,
    mlp: int,
    heads: int,
    key_heads: int = KEY_HEADS,
    dim: int = DIM,
) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights whose images have `side` x `side` tokens."""
    text = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=dim,
        max_position_embeddings=1 << 17,
    )
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4 * side,
        patch_size=4,
    )
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_id=1000, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def fill(cache: DynamicCache, model: LlavaForConditionalGeneration, side: int, seed: int = 0) -> DynamicCache:
    """Fill every layer as a prompt with one image would."""
    tokens, layers = side * side + TEXT, model.config.text_config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    state = None
    if is_patched(model):
        runtime = patch_of(model).runtime
        state = adopt(cache, runtime, runtime.config, runtime.layers)
        state.begin([span(side)], 1, tokens)
    for i in range(layers):
        key, value = torch.randn(2, 1, KEY_HEADS, tokens, DIM, generator=generator).to(model.dtype)
        cache.update(key, value, i)
    if state is not None:
        state.finish(True)
    return cache


@torch.no_grad()
def decode_step(side: int, dtype: torch.dtype, config: GazeConfig, rounds: int) -> dict[str, Any]:
    """One forward of a token through a four-layer model whose attention dominates."""
    model = llava(4, side, dtype, hidden=1024, mlp=1024, heads=HEADS)
    twin, token = copy.deepcopy(model), torch.tensor([[5]])
    apply(model, config)
    gazing, plain = fill(DynamicCache(), model, side), fill(DynamicCache(), twin, side)
    ways = {
        "gaze": lambda: model(input_ids=token, **{CACHE: gazing}),
        "dense": lambda: twin(input_ids=token, **{CACHE: plain}),
    }
    taken = side_by_side(ways, rounds)
    return {
        "visual_tokens": side * side,
        "dtype": str(dtype).removeprefix("torch."),
        "budget": config.budget,
        "gaze_ms": statistics.median(taken["gaze"]),
        "dense_ms": statistics.median(taken["dense"]),
        "over_dense": ratio(taken["dense"], taken["gaze"]),
    }


# ---- the rest


@torch.no_grad()
def flatness(steps: int = 1000) -> dict[str, Any]:
    """Whether a step costs the same late in an answer: 16k visual tokens, float32, a model with a usual MLP."""
    model = llava(2, 128, torch.float32, hidden=2048, mlp=8192, heads=16)
    apply(model, replace(SETTINGS["64"], budget=0.1))
    early, late = fill(DynamicCache(), model, 128), fill(DynamicCache(), model, 128)
    token = torch.tensor([[5]])
    for cache, count in ((early, 10), (late, steps)):
        for _ in range(count):
            model(input_ids=token, **{CACHE: cache})
    # `early` grows while it is timed, but only from 10 to 50 tokens.
    ways = {
        "early": lambda: model(input_ids=token, **{CACHE: early}),
        "late": lambda: model(input_ids=token, **{CACHE: late}),
    }
    taken = side_by_side(ways, rounds=40)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "step_10_ms": medians["early"],
        f"step_{steps}_ms": medians["late"],
        "ratio": ratio(taken["late"], taken["early"]),
    }


@torch.no_grad()
def prefill(rounds: int) -> dict[str, Any]:
    """A prompt of 4k visual tokens, float32, patched and not; and the memory of the caches it leaves."""
    side = 64
    model = llava(2, side, torch.float32, hidden=1024, mlp=2816, heads=8)
    twin = copy.deepcopy(model)
    ids = torch.cat([torch.full((1, 32), 5), torch.full((1, side * side), 1000), torch.full((1, 32), 5)], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 4 * side, 4 * side)}
    apply(model, replace(SETTINGS["64"], budget=0.1))
    taken = side_by_side({"gaze": lambda: model(**inputs), "dense": lambda: twin(**inputs)}, rounds, seconds=90)
    cache, plain = model(**inputs)[CACHE], twin(**inputs)[CACHE]
    token = torch.tensor([[5]])
    model(input_ids=token, **{CACHE: cache})
    twin(input_ids=token, **{CACHE: plain})
    held = sum(layer.nbytes() for layer in cache.layers)
    dense = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in plain.layers)
    return {
        "visual_tokens": side * side,
        "gaze_ms": statistics.median(taken["gaze"]),
        "dense_ms": statistics.median(taken["dense"]),
        "over_dense": 1 / ratio(taken["dense"], taken["gaze"]),
        "cache_memory_ratio": held / dense,
    }


def apply_time() -> dict[str, Any]:
    """`apply` and `restore` on a model of 32 layers."""
    model = llava(32, 8, torch.float32, hidden=64, mlp=64, heads=8)
    taken = []
    for _ in range(11):
        start = time.perf_counter()
        apply(model)
        taken.append(1e3 * (time.perf_counter() - start))
        restore(model)
    return {"layers": 32, "apply_ms": statistics.median(taken)}


# ---- the tables


def table(rows: list[dict[str, Any]]) -> str:
    """Plain aligned columns."""
    heads = list(rows[0])
    cells = [heads, *([_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def attention_steps(quick: bool) -> list[dict[str, Any]]:
    """One attention step with selection."""
    rows = []
    for dtype, side in itertools.product(DTYPES, (32, 64, 128) if quick else (32, 64, 128, 256)):
        _progress(f"attention step: {dtype}, {side} x {side}")
        rows += attention_step(side, dtype, rounds=7)
    return rows


def decode_steps(quick: bool) -> list[dict[str, Any]]:
    """A whole step of a model."""
    settings = (("64", 0.05), ("64", 0.1), ("64", 0.25), ("64", 1.0), ("the defaults", 0.25))
    rows = []
    for dtype, side, (name, budget) in itertools.product(DTYPES, (64, 128) if quick else (64, 128, 256), settings):
        _progress(f"decode step: {dtype}, {side} x {side}, {name}, {budget}")
        row = decode_step(side, dtype, replace(SETTINGS[name], budget=budget), rounds=5)
        rows.append({"regions": name, **row})
    return rows


DTYPES = (torch.float32, torch.bfloat16)
TABLES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "attention_step": attention_steps,
    "decode_step": decode_steps,
    "flatness": lambda quick: [flatness(100 if quick else 1000)],
    "prefill": lambda quick: [prefill(2 if quick else 5)],
    "apply": lambda quick: [apply_time()],
}


def _progress(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, shorter answers")
    parser.add_argument("--only", choices=TABLES, action="append", help="this table alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, help="keep every table, when it is done, in FILE as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    figures: dict[str, Any] = {"machine": machine()}
    for name in options.only or TABLES:
        figures[name] = TABLES[name](options.quick)
        if not options.json:
            print(f"{name}\n{table(figures[name])}\n", flush=True)
        if options.out is not None:
            with options.out.open("a") as lines:
                lines.write(json.dumps({"machine": figures["machine"], name: figures[name]}) + "\n")
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
