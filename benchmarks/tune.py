"""Measure launch settings of the decode kernel on this GPU: `python benchmarks/tune.py [--write]`.

Every candidate runs a small and a large step in a CUDA graph; the best by the geometric mean of both is kept. `--write`
puts them in `gazepatch/kernels/tuned.py`, beside those of other architectures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
from on_gpu import Layers, graph_ms, layers_needed, machine

import gazepatch.kernels.tuned as tuned
from gazepatch.config import GazeConfig
from gazepatch.kernels.launches import architecture
from gazepatch.ops.decode import DecodePlan
from gazepatch.scores import Scores

CONFIG = GazeConfig(region=(8, 8, 1), window=None, budget=0.1, periphery=False, min_visual_tokens=0)
#: Rows and frames of 24 x 24 tokens
CASES = ((1, 57), (8, 228))
DTYPES = {2: torch.bfloat16, 4: torch.float32}
Settings = tuple[int, int, int, int]


def candidates(dim: int, size: int) -> list[Settings]:
    """Tiles, warps, stages and programs per multiprocessor that may be good."""
    blocks = [block for block in (16, 32, 64, 128) if 4096 <= block * dim * size <= 32768]
    return list(itertools.product(blocks, (4, 8), (2, 3, 4), (1, 2, 3)))


def tune(dim: int, size: int, device: torch.device) -> tuple[Settings, list[tuple[float, Settings]]]:
    """The best settings, and all that ran with their mean microseconds."""
    like = torch.empty(0, dtype=DTYPES[size], device=device)
    key = (architecture(device), dim, size)
    cases = []
    for batch, frames in CASES:
        grid, shape = (frames, 24, 24), (batch, 32, 8, dim)
        read = (one := Layers(grid, CONFIG, (1, 32, 8, dim), 1, like)).bytes_read(one.plan(DecodePlan))
        count = layers_needed(batch * (read["selected"] + read["mean_keys"]), 2 * batch * read["dense"], device, 0.2)
        cases.append(Layers(grid, CONFIG, shape, count, like))
    ran = []
    for settings in candidates(dim, size):
        tuned.DECODE[key] = settings
        try:
            times = [_ms(layers) for layers in cases]
        except Exception as error:  # too much shared memory, say
            print(f"  {key} {settings}: {type(error).__name__}", file=sys.stderr, flush=True)
            continue
        ran.append((1e3 * math.prod(times) ** (1 / len(times)), settings))
    ran.sort()
    return ran[0][1], ran


def _ms(layers: Layers) -> float:
    plan = layers.plan()
    scores = Scores(layers.shape[3] ** -0.5)
    both = zip(layers.queries, layers.entries, strict=True)
    return graph_ms([lambda q=q, e=e: plan.decode(q, e, scores) for q, e in both], rounds=7)


def write(path: Path, found: dict[tuple[str, int, int], Settings], measured: str) -> None:
    """Put settings in the table, in order, and say where they were measured."""
    text = path.read_text(encoding="utf-8")
    head, _ = text.split("DECODE: dict", 1)
    rows = dict(sorted((tuned.DECODE | found).items()))
    note = f"#: Of {sorted({key[0] for key in found})}: {measured}\n"
    body = "".join(f'    ("{key[0]}", {key[1]}, {key[2]}): {value},\n' for key, value in rows.items())
    partial = path.with_suffix(".partial")
    table = f"DECODE: dict[tuple[str, int, int], tuple[int, int, int, int]] = {{\n{body}}}\n"
    partial.write_text(f"{head}{note}{table}", encoding="utf-8")
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, choices=(64, 128, 256), action="append", help="this head dim alone")
    parser.add_argument("--bytes", type=int, choices=DTYPES, action="append", help="elements of this size alone")
    parser.add_argument("--write", action="store_true", help="put the settings in gazepatch/kernels/tuned.py")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU, found none")
    device = torch.device("cuda")
    before, found = dict(tuned.DECODE), {}
    for dim, size in itertools.product(options.dim or (64, 128, 256), options.bytes or DTYPES):
        best, ran = tune(dim, size, device)
        found[architecture(device), dim, size] = best
        print(
            f"head dim {dim}, {size} bytes: {best}",
            *(f"    {us:.1f} us {s}" for us, s in ran[:5]),
            sep="\n",
            flush=True,
        )
    tuned.DECODE.clear()
    tuned.DECODE.update(before)
    if options.write:
        where = machine(device)
        write(Path(tuned.__file__), found, f"measured on {where['gpu']}, triton {where['triton']}")


if __name__ == "__main__":
    main()
