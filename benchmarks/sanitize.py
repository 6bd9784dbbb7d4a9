"""Every kernel once at odd sizes, for `compute-sanitizer --tool memcheck python benchmarks/sanitize.py`.

A decode step of rows with different images, with periphery and without, by the mean of the heads and each for itself;
a prompt with gaze, forward and backward, and the means of its windows. Small: each launch is checked access by access.
Set `PYTORCH_NO_CUDA_MEMORY_CACHING=1`, so that an access past the end of a tensor is one outside of all memory.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import checkout  # noqa: F401  # before the package
import torch
from torch import Tensor

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.layout import Span
from gazepatch.ops.prefill import Keys, Queries, gaze_prefill
from gazepatch.score_mod import ScoreMod

#: Images of two rows that differ, on grids that regions of 3 x 2 do not divide; then text.
SPANS = [Span(0, 3, 38, (1, 5, 7), 0), Span(1, 1, 34, (3, 11, 1), 0), Span(1, 36, 45, None, 1)]
TOKENS, HEADS, KEY_HEADS, DIM = 51, 6, 2, 24
BASE = GazeConfig(region=(3, 2, 1), window=None, budget=0.3, periphery=False, min_visual_tokens=0, backend="triton")
SETTINGS = (BASE, replace(BASE, window=(1, 2, 1), periphery=True, head_reduce="max"), replace(BASE, head_reduce="none"))


def run(config: GazeConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[B, H, 1, D]` of a decode step, and the gradient of a prompt's keys."""
    owner = torch.nn.Module()
    state = GazeState(owner, config)
    layer, score_mod = GazeLayer(state, gazes=True, leads=True), ScoreMod(DIM**-0.5)

    def random(heads: int, tokens: int) -> Tensor:
        return torch.randn(2, heads, tokens, DIM, device=device, dtype=dtype)

    state.begin(SPANS, 2, TOKENS)
    key, value = random(KEY_HEADS, TOKENS).requires_grad_(), random(KEY_HEADS, TOKENS).requires_grad_()
    layer.update(key, value)
    positions = torch.arange(46, TOKENS, device=device)
    assert layer.mean_keys is not None
    tables = state.table("regions", device), state.table("region_of", device)
    keys = Keys(key, value, layer.mean_keys, layer.mean_values, *tables)
    queries = Queries(random(HEADS, len(positions)).requires_grad_(), positions, None, score_mod)
    gaze_prefill(queries, keys, config).float().square().sum().backward()
    state.finish(True)
    assert key.grad is not None
    with torch.no_grad():
        detached = GazeState(owner, config)
        step = GazeLayer(detached, gazes=True, leads=True)
        detached.begin(SPANS, 2, TOKENS)
        step.update(key.detach(), value.detach())
        detached.finish(True)
        detached.begin([], 2, 1)
        step.update(random(KEY_HEADS, 1), random(KEY_HEADS, 1))
        query = random(HEADS, 1)
        bias, pending, entries = detached.bias(None, device), step.take_pending(), step.entries()
        output = detached.plan(query, entries).decode(query, entries, score_mod, bias, pending=pending).output
        detached.finish(True)
    return output, key.grad


def main() -> None:
    """Run all; fails where a number is not finite."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("needs a GPU, found none: set TRITON_INTERPRET=1 to run the kernels slowly without one")
    for config in SETTINGS:
        for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
            for made in run(config, device, dtype):
                if not made.isfinite().all():
                    raise SystemExit(f"not finite with {config}, {dtype}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran", file=sys.stderr)


if __name__ == "__main__":
    main()
