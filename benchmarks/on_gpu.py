"""What the GPU benchmarks share: layers of random entries, and times of CUDA graphs with a cold cache.

Without a GPU every call runs once or twice as it is, for dry runs: what is measured then means nothing.
"""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gazepatch.chunk import sort_chunk
from gazepatch.config import GazeConfig
from gazepatch.layout import Grid, Span
from gazepatch.ops.decode import DecodePlan, Entries

TEXT = 64  # other entries beside the visual ones
#: About a millisecond, in which the host launches the largest of graphs.
BUSY_CYCLES = 2_000_000


class Layers:
    """Random entries of several layers, stored as a gaze cache stores them, each with a query of its own.

    Args:
        grid: `(t, h, w)` of the visual tokens of a row.
        config: Regions, windows, budget and periphery.
        shape: Rows, query heads, key heads, head dim.
        count: Layers.
        like: Gives type and device.
    """

    def __init__(
        self, grid: Grid, config: GazeConfig, shape: tuple[int, int, int, int], count: int, like: Tensor
    ) -> None:
        batch, heads, key_heads, dim = shape
        self.grid, self.config, self.shape, self.like = grid, config, shape, like
        tokens = grid[0] * grid[1] * grid[2]
        chunk = sort_chunk([Span(0, 0, tokens, grid, 0)], 1, 0, tokens, config).to(like.device)
        self.regions, self.tokens = chunk.regions, tokens
        self.queries = [like.new_empty(batch, heads, 1, dim).normal_() for _ in range(count)]
        self.entries = []
        for _ in range(count):
            key, value = (like.new_empty(batch, key_heads, TEXT, dim).normal_() for _ in range(2))
            stores = [like.new_empty(batch, key_heads, tokens, dim).normal_() for _ in range(2)]
            means = [_means(store, chunk.slot_windows, self.regions.log_counts.shape[1]) for store in stores]
            self.entries.append(Entries(key, value, *stores, means[0], means[1] if config.periphery else None))

    def plan(self, kind: type[DecodePlan] | None = None) -> DecodePlan:
        """The kernels' plan, or another kind."""
        from gazepatch.kernels.plan import KernelPlan

        batch, heads, key_heads, _ = self.shape
        return (kind or KernelPlan)(self.regions, self.config, batch, heads, key_heads)

    def bytes_read(self, plan: DecodePlan) -> dict[str, int]:
        """Bytes that one layer's step has to read, by what they are. Regions without raggedness."""
        batch, _, key_heads, dim = self.shape
        entry = batch * key_heads * dim * self.like.element_size()
        selected = round(self.tokens * plan.count / self.regions.start.shape[1])
        windows = self.regions.log_counts.shape[1]
        return {
            "selected": 2 * selected * entry,
            "text": 2 * TEXT * entry,
            "mean_keys": windows * entry,
            "mean_values": windows * entry if self.config.periphery else 0,
            "dense": 2 * (self.tokens + TEXT) * entry,
        }


def _means(store: Tensor, slot_windows: Tensor, windows: int) -> Tensor:
    """Means of a store, row by row, so that the float32 copy stays small."""
    rows = []
    for row in store:
        sums = row.new_zeros(row.shape[0], windows, row.shape[2], dtype=torch.float32)
        sums.index_add_(1, slot_windows[0], row.float())
        counts = torch.bincount(slot_windows[0], minlength=windows).clamp(min=1)
        rows.append((sums / counts[:, None]).to(store.dtype))
    return torch.stack(rows)


def layers_needed(touched: int, held: int, device: torch.device, memory: float = 0.4) -> int:
    """Layers enough that none finds its own in the cache: they touch three times its size, if they fit in memory."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    wanted = -(-3 * int(properties.L2_cache_size) // touched)
    return max(1, min(max(wanted, 2), int(memory * properties.total_memory) // held, 512))


def captured(steps: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that runs all `steps`: the replay of a CUDA graph; without a GPU, where nothing is timed, themselves."""
    if not torch.cuda.is_available():
        return lambda: [step() for step in steps]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def graph_ms(steps: Sequence[Callable[[], object]], rounds: int = 25, seconds: float = 2.0) -> float:
    """Median milliseconds of one of `steps`, when a graph of them all is replayed; fewer rounds if they take long."""
    replay = captured(steps)
    if not torch.cuda.is_available():
        return elapsed_ms(replay) / len(steps)
    warm = [elapsed_ms(replay, queued=True) for _ in range(3)]
    rounds = max(min(rounds, 7), min(rounds, int(1e3 * seconds / max(min(warm), 1e-3))))
    return statistics.median(elapsed_ms(replay, queued=True) for _ in range(rounds)) / len(steps)


def elapsed_ms(call: Callable[[], object], queued: bool = False) -> float:
    """Milliseconds that a call keeps the GPU, from when it is free until it is again: the host's delays count.

    Not so with `queued`: the GPU is kept busy until the host has handed it the call, so that only its own time counts.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def free() -> None:
    """Give back all memory of the GPU that nobody holds, cycles and the pools of graphs included."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def lacking(wanted: int, device: torch.device, what: str) -> str | None:
    """Why `wanted` bytes do not fit into the memory that is free, with the sizes; None when they do."""
    if device.type != "cuda":
        return None
    free()
    left, there = torch.cuda.mem_get_info(device)
    if wanted <= left:
        return None
    return f"does not fit: {what} take {wanted / 2**30:.1f} GiB, {left / 2**30:.1f} of {there / 2**30:.1f} GiB are free"


def triad_gbs(device: torch.device) -> float:
    """Gigabytes a second of `a = b + s * c`, the highest of which the memory is good in practice."""
    # Not of zeros, which take less power, and so run faster than anything real.
    a, b, c = (torch.empty(1 << (28 if device.type == "cuda" else 10), device=device).normal_() for _ in range(3))
    return 3 * a.numel() * a.element_size() / graph_ms([lambda: torch.add(b, c, alpha=2.0, out=a)]) / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on."""
    import transformers
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    found |= {"transformers": transformers.__version__, "python": platform.python_version(), "gpu": "none"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found |= {"l2_bytes": int(properties.L2_cache_size), "memory_bytes": int(properties.total_memory)}
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return found


def first_line(error: BaseException) -> str:
    """Of an error, for a row of the results."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:160]}"
