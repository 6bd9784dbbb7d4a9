"""What gaze attention saves on a GPU: `python benchmarks/decode_gpu.py [--quick] [--only TABLE] [--json] [--dry-run]`.

Attention of one decode step with random entries, in CUDA graphs over so many layers that none finds its own in the L2
cache, medians. Appending the new entry is left out on both sides. Results are kept in `benchmarks/results/decode_gpu.*`
as they come, so a run that is cut short leaves what it has.

`model_step` alone times a whole step, appending included: of a model of Qwen2.5-VL-7B's shape, on a static cache.

`--dry-run` sets up the data of one small case wherever it runs, says what a step would read, and runs a small model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_step import check as check_model
from model_step import model_steps
from on_gpu import Layers, graph_ms, layers_needed, machine, triad_gbs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gazepatch.config import GazeConfig
from gazepatch.ops.decode import DecodePlan, Entries
from gazepatch.scores import Scores

HEADS, KEY_HEADS, DIM = 32, 8, 128
SCORES = Scores(DIM**-0.5)
#: Frames of 24 x 24 tokens, which regions of 6 x 6 and of 8 x 8 divide: 8,064, 32,832 and 131,328 tokens
FRAMES = {"8k": 14, "32k": 57, "128k": 228}
PAPER = GazeConfig(window=None, budget=0.1, periphery=False, min_visual_tokens=0)
SETTINGS = {
    "36, paper": replace(PAPER, region=(6, 6, 1)),
    "64, paper": replace(PAPER, region=(8, 8, 1)),
    "the defaults": GazeConfig(min_visual_tokens=0),
    "the defaults at 0.1": GazeConfig(min_visual_tokens=0, budget=0.1),
}
WHOLE = replace(SETTINGS["64, paper"], budget=1.0)
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def case(grid: tuple[int, int, int], batch: int, config: GazeConfig, device: torch.device) -> tuple[Layers, DecodePlan]:
    """As many layers as a cold cache needs."""
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    one = Layers(grid, config, (1, HEADS, KEY_HEADS, DIM), 1, like)
    read = one.bytes_read(one.plan(DecodePlan))
    touched = batch * (sum(read.values()) - read["dense"])
    count = layers_needed(touched, 2 * batch * read["dense"], device)
    layers = Layers(grid, config, (batch, HEADS, KEY_HEADS, DIM), count, like)
    return layers, layers.plan()


# ---- the ways


def gaze(layers: Layers, plan: Any) -> list[Callable[[], object]]:
    """Selection and decode of every layer."""
    return [lambda q=q, e=e: plan.decode(q, e, SCORES) for q, e in zip(layers.queries, layers.entries, strict=True)]


def selections(layers: Layers, plan: Any) -> list[Callable[[], object]]:
    """The selection alone."""
    far = layers.config.periphery
    return [
        lambda q=q, e=e: plan._select(q[:, :, 0], e, DIM**-0.5, far, None)
        for q, e in zip(layers.queries, layers.entries, strict=True)
    ]


def attentions(layers: Layers, plan: Any) -> list[Callable[[], object]]:
    """Decode alone, of the regions that a selection has left in the plan."""
    far = layers.config.periphery
    plan.decode(layers.queries[0], layers.entries[0], SCORES)
    return [
        lambda q=q, e=e: plan._attend(q[:, :, 0], e, DIM**-0.5, None, far)
        for q, e in zip(layers.queries, layers.entries, strict=True)
    ]


def dense(layers: Layers) -> Iterator[tuple[str, Callable[[], float]]]:
    """Dense attention in every way there is, and how long each takes."""
    stored = [(torch.cat([e.visual_key, e.key], 2), torch.cat([e.visual_value, e.value], 2)) for e in layers.entries]
    both = list(zip(layers.queries, stored, strict=True))
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():
        for how, step in (("heads grouped", _grouped), ("enable_gqa", _gqa)):
            yield f"{name}, {how}", lambda b=backend, s=step: _with(b, [s(q, k, v) for q, (k, v) in both])
    yield "flex attention", lambda: graph_ms(_flex(both))
    new = layers.queries[0].new_zeros(layers.shape[0], KEY_HEADS, 1, DIM)
    yield "transformers", lambda: graph_ms([_appended(q, k, v, new) for q, (k, v) in both])


def _with(backend: SDPBackend, steps: list[Callable[[], object]]) -> float:
    with sdpa_kernel(backend):
        return graph_ms(steps)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    rows = q.view(len(q), KEY_HEADS, HEADS // KEY_HEADS, DIM)
    return lambda: sdpa(rows, k, v)


def _gqa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    return lambda: sdpa(q, k, v, enable_gqa=True)


def _flex(both: list[Any]) -> list[Callable[[], object]]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # every shape is compiled for itself, more of them than are allowed
    compiled = torch.compile(flex_attention, dynamic=False)
    return [lambda q=q, k=k, v=v: compiled(q, k, v, enable_gqa=True) for q, (k, v) in both]


def _appended(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Callable[[], object]:
    """What transformers' DynamicCache and sdpa do: copy the cache with the new entry behind it, then attend."""
    return lambda: sdpa(q, torch.cat([k, new], 2), torch.cat([v, new], 2), enable_gqa=True)


# ---- the tables


def check(device: torch.device) -> Iterator[Row]:
    """The kernels against their twin in float32 on this very machine, before anything is timed."""
    limits = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
    for (name, config), grid, dtype in itertools.product(SETTINGS.items(), ((14, 24, 24), (5, 23, 25)), limits):
        like = torch.empty(0, dtype=dtype, device=device)
        layers = Layers(grid, config, (2, HEADS, KEY_HEADS, DIM), 1, like)
        query, entries = layers.queries[0], layers.entries[0]
        exact = Entries(*(None if entry is None else entry.float() for entry in entries))
        ours = layers.plan().decode(query, entries, SCORES)
        twin = layers.plan(DecodePlan).decode(query.float(), exact, SCORES)
        error = (ours.output.float() - twin.output).abs().max().item()
        row = {"settings": name, "grid": str(grid), "dtype": str(dtype), "max_error": error, "read": int(ours.read)}
        if not error < limits[dtype] or int(ours.read) != int(twin.read):
            raise SystemExit(f"the kernels are wrong here: {row}, their twin read {int(twin.read)}")
        yield row


def steps(device: torch.device, quick: bool) -> Iterator[Row]:
    """A step, selection included, against dense attention; and the bandwidth of the decode kernel alone."""
    triad = triad_gbs(device)
    for batch, (size, frames) in itertools.product((1,) if quick else (1, 16), FRAMES.items()):
        grid = (frames, 24, 24)
        best, default, times = _dense_times(grid, batch, device)
        for name, config in SETTINGS.items():
            layers, plan = case(grid, batch, config, device)
            read = layers.bytes_read(plan)
            whole, alone = graph_ms(gaze(layers, plan)), graph_ms(attentions(layers, plan))
            moved = read["selected"] + read["text"] + read["mean_values"]
            yield {
                "settings": name,
                "batch": batch,
                "visual": size,
                "budget": config.budget,
                "selected_mb": read["selected"] / 1e6,
                "step_us": 1e3 * whole,
                "decode_us": 1e3 * alone,
                "decode_gbs": moved / alone / 1e6,
                "of_triad": moved / alone / 1e6 / triad,
                "best_dense": best[0],
                "over_best_dense": best[1] / whole,
                "over_transformers": default / whole if default else None,
                "dense_us": times,
                "triad_gbs": triad,
            }
            del layers, plan
            torch.cuda.empty_cache()


def _dense_times(grid: Any, batch: int, device: torch.device) -> tuple[tuple[str, float], float | None, Row]:
    """The best way of reading everything with its milliseconds, transformers' own, and microseconds of all."""
    layers, plan = case(grid, batch, WHOLE, device)
    found: dict[str, float] = {"our kernel, everything read": graph_ms(gaze(layers, plan))}
    failed: dict[str, str] = {}
    for name, timed in dense(layers):
        try:
            found[name] = timed()
        except Exception as error:  # a way that this machine does not have; said in the results
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else repr(error)
    ways = {name: ms for name, ms in found.items() if name != "transformers"}
    best = min(ways, key=ways.__getitem__)
    del layers, plan
    torch.cuda.empty_cache()
    return (best, ways[best]), found.get("transformers"), {n: 1e3 * ms for n, ms in found.items()} | failed


def selection(device: torch.device, quick: bool) -> Iterator[Row]:
    """The selection alone, against the twin's with torch.topk, and its share of the step."""
    for batch, size, name in itertools.product((1, 16), ("32k", "128k"), ("36, paper", "64, paper", "the defaults")):
        layers, plan = case((FRAMES[size], 24, 24), batch, SETTINGS[name], device)
        alone, whole = graph_ms(selections(layers, plan)), graph_ms(gaze(layers, plan))
        read = layers.bytes_read(plan)
        yield {
            "settings": name,
            "batch": batch,
            "visual": size,
            "regions": layers.regions.start.shape[1],
            "select_us": 1e3 * alone,
            "mean_keys_gbs": read["mean_keys"] / alone / 1e6,
            "of_step": alone / whole,
        }
        del layers, plan
        torch.cuda.empty_cache()


def few_tokens(device: torch.device, quick: bool) -> Iterator[Row]:
    """Sequences so short that selecting may cost more than it saves: where to set `min_visual_tokens`."""
    for (h, w), frames in (((16, 16), 1), ((24, 24), 1), ((24, 24), 2), ((24, 24), 4), ((24, 24), 7)):
        best, _, _ = _dense_times((frames, h, w), 1, device)
        for name in ("64, paper", "the defaults"):
            layers, plan = case((frames, h, w), 1, SETTINGS[name], device)
            ms = graph_ms(gaze(layers, plan))
            yield {
                "settings": name,
                "visual_tokens": frames * h * w,
                "step_us": 1e3 * ms,
                "best_dense": best[0],
                "over_best_dense": best[1] / ms,
            }


def model_step(device: torch.device, quick: bool) -> Iterator[Row]:
    """A whole step of a model of Qwen2.5-VL-7B's shape, with everything that is not attention."""
    sizes = {size: (frames, 24, 24) for size, frames in FRAMES.items() if size == "128k" or not quick}
    yield from model_steps({name: SETTINGS[name] for name in ("64, paper", "the defaults")}, sizes, device)


TABLES: dict[str, Callable[[torch.device, bool], Any]] = {
    "check": lambda device, quick: check(device),
    "steps": steps,
    "selection": selection,
    "few_tokens": few_tokens,
    "model_step": model_step,
}


def dry_run(device: torch.device) -> list[Row]:
    """Set up one small case of every setting, and say what a step would read."""
    rows = []
    for name, config in SETTINGS.items():
        like = torch.empty(0, dtype=torch.bfloat16, device=device)
        layers = Layers((2, 24, 24), config, (2, HEADS, KEY_HEADS, DIM), 2, like)
        plan = layers.plan(DecodePlan)
        rows.append({"settings": name, "regions": layers.regions.start.shape[1], "count": plan.count})
        rows[-1] |= layers.bytes_read(plan)
    error = check_model(device)
    return [row | {"model_error": error} for row in rows]


def table(rows: list[Row]) -> str:
    """Plain aligned columns, without those that hold tables of their own."""
    heads = [name for name, value in rows[0].items() if not isinstance(value, dict)]
    cells = [heads, *([_cell(row[head]) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def keep(figures: dict[str, Any], folder: Path) -> None:
    """Write what there is so far."""
    text = "\n\n".join(f"{n}\n{table(r)}" if isinstance(r, list) and r else f"{n}\n{r}" for n, r in figures.items())
    for name, content in (("decode_gpu.txt", text + "\n"), ("decode_gpu.json", json.dumps(figures, indent=1) + "\n")):
        partial = folder / f"{name}.partial"
        partial.write_text(content)
        partial.rename(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one row instead of 16")
    parser.add_argument("--only", choices=TABLES, action="append", help="this table alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="set up data only; needs no GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"machine": machine(device)}
    if options.dry_run:
        figures["dry run"] = dry_run(device)
        print(json.dumps(figures, indent=1) if options.json else table(figures["dry run"]))
        return
    if device.type != "cuda":
        raise SystemExit("needs a GPU, found none: --dry-run sets up the data without one")
    for name in options.only or TABLES:
        figures[name] = []
        for row in TABLES[name](device, options.quick):
            print(f"  {name}: {row}", file=sys.stderr, flush=True)
            figures[name].append(row)
            keep(figures, options.results)
        if not options.json:
            print(f"{name}\n{table(figures[name])}\n", flush=True)
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
