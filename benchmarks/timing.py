"""Timing several ways of doing the same, side by side: ratios that survive a noisy machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

# torch's CPU build brings two OpenMP runtimes. Threads of the one (MKL's) by default spin for 200 ms after each matrix
# product, on cores that the other (torch's own kernels, attention among them) needs. It slows dense and gaze down.
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
import transformers


def side_by_side(
    ways: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 2,
    in_a_row: int = 3,
    seconds: float = 20.0,
) -> dict[str, list[float]]:
    """Milliseconds of every way in every round.

    A round runs each way a few times in a row, as a model does step by step, and takes the median: so that all ways see
    the same machine, and none pays for what the one before it left in the caches.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    stop = time.perf_counter() + seconds
    for turn in range(warmup + rounds):
        for name, way in ways.items():
            median = statistics.median(_milliseconds(way) for _ in range(in_a_row))
            if turn >= warmup:
                taken[name].append(median)
        if turn >= warmup + 4 and time.perf_counter() > stop:
            break
    return taken


def _milliseconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return 1e3 * (time.perf_counter() - start)


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of how many times faster `fast` is than `slow`."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def machine() -> dict[str, object]:
    """What figures depend on."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "KMP_BLOCKTIME": os.environ["KMP_BLOCKTIME"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
