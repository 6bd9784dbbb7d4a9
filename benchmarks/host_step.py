"""What a decode step costs the host: `python benchmarks/host_step.py [--rounds N]`.

A GPU waits for the host where there is little to read: in short sequences at batch 1, without CUDA graphs. The model
here is so small that a step is Python and calls of torch. Kernels are compiled for an H100 and launched on nothing, so
that all is in it that Triton does, but for the last call of CUDA's driver.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton

from timing import machine  # isort: skip  # before torch: it sets the environment

import torch
from decode_cpu import llava
from no_gpu import without_gpu
from transformers import DynamicCache

from gazepatch.caches.name import CACHE
from gazepatch.config import GazeConfig
from gazepatch.patch import patched

SIDE, WARM_UP = 16, 5
SIDES: dict[str, GazeConfig | None] = {
    "unpatched": None,
    "patched, read whole": GazeConfig(),
    "a tenth, no periphery": GazeConfig(
        window=None, budget=0.1, periphery=False, min_visual_tokens=0, backend="triton"
    ),
    "the defaults, forced": GazeConfig(min_visual_tokens=0, backend="triton"),
}


@torch.inference_mode()
def step_ms(model: Any, steps: int) -> float:
    """Median of the steps after a prompt with one image."""
    cache = {CACHE: DynamicCache(config=model.config.text_config)}
    ids = torch.tensor([[1, 2, *[model.config.image_token_id] * SIDE**2, 7, 8]])
    model(input_ids=ids, pixel_values=torch.zeros(1, 3, 4 * SIDE, 4 * SIDE), **cache)
    token, taken = torch.tensor([[9]]), []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        model(input_ids=token, **cache)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[WARM_UP:])


def measure(layers: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a step, of every side in every round, in turn."""
    model = llava(layers, SIDE, torch.float32, hidden=64, mlp=64, heads=4, key_heads=2, dim=16)
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name, config in SIDES.items():
            with nullcontext() if config is None else patched(model, config):
                taken[name].append(step_ms(model, steps))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    without_gpu()
    taken = measure(options.layers, options.rounds, steps=60)
    print(f"{machine()}\n{options.layers} layers, medians of {options.rounds} rounds")
    for name, times in taken.items():
        pairs = zip(times, taken["unpatched"], strict=True)
        over = statistics.median(ours - dense for ours, dense in pairs)
        print(f"{name:22} {statistics.median(times):6.2f} ms  {1e3 * over / options.layers:+6.1f} us a layer")


if __name__ == "__main__":
    main()
