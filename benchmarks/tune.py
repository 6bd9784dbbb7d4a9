"""Measure launch settings of the decode kernel on this GPU: `python benchmarks/tune.py [--write] [--seconds S]`.

Every candidate runs small steps and a large one in a CUDA graph; the best by the geometric mean is kept. First tiles,
warps and stages with as many warps a multiprocessor as the table has now, the present settings before all others; then
other numbers of programs for the best of these; then the best of those launched early, or not if they were. What most
of them compile to is compiled before, by several processes. When `--seconds` of measuring are over, the best so far
counts.

`--write` puts them in `gazepatch/kernels/tuned.py`, beside those of other architectures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import checkout  # noqa: F401  # before the package
import torch
from attention_ways import gaze
from on_gpu import Layers, first_line, free, graph_ms, layers_needed, machine

import gazepatch.kernels.tuned as tuned
from gazepatch.config import GazeConfig
from gazepatch.kernels.settings import apart, architecture, forget, tuned_for
from gazepatch.ops.decode import DecodePlan
from gazepatch.score_mod import ScoreMod

CONFIG = GazeConfig(region=(8, 8, 1), window=None, budget=0.1, periphery=False, min_visual_tokens=0)
#: Rows, frames of 24 x 24 tokens, heads and key heads: with few of these, more programs share what one of them reads.
CASES = ((1, 57, 32, 8), (1, 228, 28, 4), (16, 57, 32, 8))
DTYPES = {2: torch.bfloat16, 4: torch.float32}
#: As in `gazepatch.kernels.settings.Tuned`.
Settings = tuple[int, int, int, int, bool]
#: What ran: microseconds and settings.
Ran = list[tuple[float, Settings]]
#: How many of the best get other numbers of programs.
FINALISTS = 4
#: How many of the best after that are launched early, too, or are not. Where more programs fit on a multiprocessor than
#: are planned, those launched early crowd where there is room first, and large steps take longer.
EARLY = 4
#: Processes that compile; each holds a context of the GPU.
MAX_COMPILERS = 8


def candidates(dim: int, size: int, present: Settings) -> list[Settings]:
    """The present settings, and then others that may be good, with as many warps a multiprocessor."""
    _, present_warps, _, programs, early = present
    blocks = [block for block in (16, 32, 64, 128) if 4096 <= block * dim * size <= 32768]
    tiles = itertools.product(blocks, (2, 4, 8), (3, 2, 4))
    # A warp has 16 entries of a tile at least.
    others = [
        (block, warps, stages, max(1, programs * present_warps // warps), early)
        for block, warps, stages in tiles
        if block >= 16 * warps or not apart(dim, size)
    ]
    return [present, *(settings for settings in others if settings != present)]


def search(present: Settings, dim: int, size: int, measure: Callable[[Settings], float | None], seconds: float) -> Ran:
    """All that ran before `seconds` were over, the best first. `measure` gives None for what does not run."""
    began, ran = time.perf_counter(), Ran()

    def each(of: Iterable[Settings]) -> None:
        for settings in of:
            if ran and time.perf_counter() - began > seconds:
                print(f"  {seconds:g} s are over: not all candidates ran", file=sys.stderr, flush=True)
                return
            if (us := measure(settings)) is not None:
                ran.append((us, settings))
        ran.sort()

    each(candidates(dim, size, present))
    best = [settings for _, settings in sorted(ran)[:FINALISTS]]
    each(
        (*tile, programs, early)
        for *tile, present_programs, early in best
        for programs in (1, 2, 3, 4)
        if programs != present_programs
    )
    each((*launch, not early) for *launch, early in [settings for _, settings in ran[:EARLY]])
    return ran


def compile_ahead(dim: int, size: int, present: Settings) -> None:
    """Have other processes compile the candidates, launched early or not, into the cache that Triton keeps."""
    settings = [(*launch, early) for *launch, _ in candidates(dim, size, present) for early in (False, True)]
    jobs = min(MAX_COMPILERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_once, *([value] * len(settings) for value in (dim, size)), settings))


def run_once(dim: int, size: int, settings: Settings) -> None:
    """A small step of every number of heads; nothing where these settings do not run, which `tune` will see, too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _take((architecture(device), dim, size), settings)
    like = torch.empty(0, dtype=DTYPES[size], device=device)
    for heads in sorted({case[2:] for case in CASES}):
        try:
            for step in _steps(Layers((1, 24, 24), CONFIG, (1, *heads, dim), 1, like)):
                step()
        except Exception as error:
            print(f"  {settings}: {first_line(error)}", file=sys.stderr, flush=True)


def tune(dim: int, size: int, device: torch.device, seconds: float) -> Ran:
    """All settings that ran with their mean microseconds, the best first."""
    like = torch.empty(0, dtype=DTYPES[size], device=device)
    key = (architecture(device), dim, size)
    cases = []
    for batch, frames, heads, key_heads in CASES:
        grid, shape = (frames, 24, 24), (batch, heads, key_heads, dim)
        read = (one := Layers(grid, CONFIG, (1, *shape[1:]), 1, like)).bytes_read(one.plan(DecodePlan))
        count = layers_needed(batch * (read["selected"] + read["mean_keys"]), 2 * batch * read["dense"], device, 0.2)
        cases.append(Layers(grid, CONFIG, shape, count, like))

    def measure(settings: Settings) -> float | None:
        _take(key, settings)
        try:
            times = [graph_ms(_steps(layers), rounds=15) for layers in cases]
        except Exception as error:  # too much shared memory, say
            print(f"  {key} {settings}: {first_line(error)}", file=sys.stderr, flush=True)
            return None
        us = 1e3 * math.prod(times) ** (1 / len(times))
        print(f"  {key} {settings}: {us:.1f} us", file=sys.stderr, flush=True)
        return us

    present: Settings = tuple(tuned_for(*key))  # type: ignore[assignment]
    ran = search(present, dim, size, measure, seconds)
    cases.clear()  # `measure` holds it
    if not ran:
        raise SystemExit(f"no settings ran for {key}: see the errors above")
    return ran


def _take(key: tuple[str, int, int], settings: Settings) -> None:
    tuned.DECODE[key] = settings
    forget()


def _steps(layers: Layers) -> list[Callable[[], object]]:
    return gaze(layers, layers.plan(), ScoreMod(layers.shape[3] ** -0.5))


def write(path: Path, found: dict[tuple[str, int, int], Settings], measured: str) -> None:
    """Put settings in the table, in order, and say above it where they were measured; an older note of them goes."""
    text = path.read_text(encoding="utf-8")
    head, _ = text.split("DECODE: dict", 1)
    rows = dict(sorted((tuned.DECODE | found).items()))
    for key in found:
        head = re.sub(rf"^#: {re.escape(_name(key))}: .*\n", "", head, flags=re.MULTILINE)
    notes = "".join(f"#: {_name(key)}: {measured}\n" for key in sorted(found))
    body = "".join(f'    ("{key[0]}", {key[1]}, {key[2]}): {value},\n' for key, value in rows.items())
    partial = path.with_suffix(".partial")
    table = f"DECODE: dict[tuple[str, int, int], tuple[int, int, int, int, bool]] = {{\n{body}}}\n"
    partial.write_text(f"{head}{notes}{table}", encoding="utf-8")
    partial.replace(path)


def _name(key: tuple[str, int, int]) -> str:
    architecture, dim, size = key
    return f"{architecture}, head dim {dim}, {size} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, choices=(64, 128, 256), action="append", help="this head dim alone")
    parser.add_argument("--bytes", type=int, choices=DTYPES, action="append", help="elements of this size alone")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each head dim and size of elements")
    parser.add_argument("--write", action="store_true", help="put the settings in gazepatch/kernels/tuned.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU, found none")
    device, where = torch.device("cuda"), machine(torch.device("cuda"))
    for dim, size in itertools.product(options.dim or (64, 128, 256), options.bytes or DTYPES):
        before, key = dict(tuned.DECODE), (architecture(device), dim, size)
        compile_ahead(dim, size, tuple(tuned_for(*key)))  # type: ignore[arg-type]
        ran = tune(dim, size, device, options.seconds)
        tuned.DECODE.clear()
        tuned.DECODE.update(before)
        best = {key: ran[0][1]}
        print(f"head dim {dim}, {size} bytes", *(f"    {us:.1f} us {s}" for us, s in ran[:8]), sep="\n", flush=True)
        if options.write:  # at once: the next one may be cut short
            write(Path(tuned.__file__), best, f"measured on {where['gpu']}, triton {where['triton']}")
        free()  # which fails where a candidate broke the GPU's state, so not before
        _take(key, best[key])


if __name__ == "__main__":
    main()
