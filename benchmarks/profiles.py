"""Which kernels a step launches on the GPU, and how long each takes: recorded by torch.profiler, from graph replays.

Not among the timings: once it has recorded, launches may be slower for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attention_ways as ways
import torch
from attention_tables import Case
from model_step import Models, filled, model_case, step_of, step_with, way_of
from on_gpu import captured, first_line, free
from shapes import DEFAULTS, SETTINGS, SETTINGS_OF_STEPS, WANTED, Setup
from torch.autograd import DeviceType

from gazepatch.patch import patched

#: Replays that are recorded, and kernels that a row has at most.
REPLAYS, MOST = 5, 24

Row = dict[str, Any]
Recorded = dict[str, dict[str, float]]


def kernels_of(steps: Sequence[Callable[[], object]]) -> Row:
    """The columns of a row: `kernels` of one of `steps`, the longest first; or why there are none in `skipped`."""
    if not torch.cuda.is_available():
        return {"skipped": "no kernels recorded: there is no GPU"}
    try:
        _recorded(lambda: None)  # a graph may show its kernels only where the profiler was there before it
        replay, recorded = captured(steps), "replays of a graph"
        averages = summed(_recorded(replay), REPLAYS * len(steps))
        if not averages:
            averages, recorded = summed(_recorded(lambda: [step() for step in steps]), REPLAYS * len(steps)), "calls"
    except Exception as error:  # of CUPTI; a profile is worth having, but not the figures that were measured before
        return {"skipped": f"no kernels recorded: {first_line(error)}"}
    if not averages:
        return {"skipped": "no kernels recorded: CUPTI is not available here, or another profiler holds it"}
    return {
        "recorded": recorded,
        "launches": sum(each["launches"] for each in averages.values()),
        "us": sum(each["us"] for each in averages.values()),
        "kernels": dict(list(averages.items())[:MOST]),
    }


def _recorded(call: Callable[[], object]) -> Iterable[Any]:
    """Torch's averages by name, of some calls."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(REPLAYS):
            call()
        torch.cuda.synchronize()
    averages: Iterable[Any] = profiled.key_averages()
    return averages


def summed(averages: Iterable[Any], steps: int) -> Recorded:
    """Launches and microseconds a step of every kernel, the longest first, from torch's averages by name."""
    found: Recorded = {}
    for event in averages:
        us = float(getattr(event, "self_device_time_total", 0.0))
        if event.device_type == DeviceType.CUDA and us > 0:
            each = found.setdefault(event.key, {"launches": 0.0, "us": 0.0})
            each["launches"] += event.count / steps
            each["us"] += us / steps
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def profile(setup: Setup, models: Models) -> Iterator[Case]:
    """A row for a step of every size: of attention, then of the model."""
    for size, frames in setup.sizes.items():
        for batch in setup.batches:
            for name in (*WANTED, DEFAULTS):

                def attention(frames: int = frames, batch: int = batch, name: str = name) -> Row:
                    layers, plan = ways.case(setup, setup.grid(frames), batch, SETTINGS[name])
                    try:
                        return kernels_of(ways.gaze(layers, plan, setup.score_mod))
                    finally:
                        free()

                yield Case({"step": "attention", "settings": name, "batch": batch, "visual": size}, attention)
    for size, frames in setup.sizes.items():
        for batch in setup.model_batches:
            for side in ("dense", "64, paper"):
                case = model_case(
                    setup, models, side, size, batch, lambda m, s=side, f=frames, b=batch: _step(setup, m, s, f, b)
                )
                key = {"step": "model", "settings": side, "batch": batch, "visual": size}
                yield Case(key, case.measure)


def _step(setup: Setup, model: Any, side: str, frames: int, batch: int) -> Row:
    grid = setup.grid(frames)
    if side == "dense":
        cache, tokens = filled(model, grid, batch)
        way = "flash" if setup.device.type == "cuda" else ways.TRANSFORMERS
        with way_of(model, way, tokens + 1):
            return kernels_of([step_with(model, cache, tokens, batch)])
    with patched(model, SETTINGS_OF_STEPS[side]):
        return kernels_of([step_of(model, grid, batch)])
