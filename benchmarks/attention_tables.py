"""The tables on attention alone, a case at a time: what it is called, and how it is measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import attention_ways as ways
import torch
from on_gpu import Layers, free, graph_ms, triad_gbs
from shapes import DEFAULTS, SETTINGS, SETTINGS_OF_STEPS, WANTED, WHOLE, Setup

from gazepatch.layout import Grid
from gazepatch.ops.decode import DecodePlan, Entries

Row = dict[str, Any]


class Case(NamedTuple):
    """One row of a table: the columns that tell it from others, and how the rest is found."""

    key: Row
    measure: Callable[[], Row]


class WrongError(Exception):
    """What is to be timed does not compute what it should."""


def check(setup: Setup) -> Iterator[Case]:
    """The kernels against their twin in float32 on this very machine, before anything is timed."""
    limits = {torch.float32: 1e-4, setup.dtype: 1e-2 if setup.dtype == torch.bfloat16 else 1e-4}
    grids = (setup.grid(setup.sizes["8k"]), (5, setup.side - 1, setup.side + 1) if setup.flex else (1, 5, 7))
    for (name, config), grid, dtype in itertools.product(SETTINGS_OF_STEPS.items(), grids, limits):

        def measure(name: str = name, config: Any = config, grid: Grid = grid, dtype: torch.dtype = dtype) -> Row:
            like = torch.empty(0, dtype=dtype, device=setup.device)
            layers = Layers(grid, config, (2, setup.heads, setup.key_heads, setup.dim), 1, like)
            query, entries = layers.queries[0], layers.entries[0]
            exact = Entries(*(None if entry is None else entry.float() for entry in entries))
            ours = layers.plan().decode(query, entries, setup.score_mod)
            twin = layers.plan(DecodePlan).decode(query.float(), exact, setup.score_mod)
            error = (ours.output.float() - twin.output).abs().max().item()
            if not error < limits[dtype] or int(ours.read) != int(twin.read):
                raise WrongError(f"off by {error}, read {int(ours.read)} entries, their twin {int(twin.read)}")
            return {"max_error": error, "read": int(ours.read)}

        yield Case({"settings": name, "grid": str(grid), "dtype": str(dtype)}, measure)


def triad(setup: Setup) -> Iterator[Case]:
    """What the memory is good for."""
    yield Case({"what": "a = b + s * c"}, lambda: {"triad_gbs": triad_gbs(setup.device)})


def dense(setup: Setup) -> Iterator[Case]:
    """Every dense way at every size."""
    yield from _dense(setup, _grids(setup, setup.sizes), setup.flex)


def few_dense(setup: Setup) -> Iterator[Case]:
    """The same for short sequences, without FlexAttention, which compiles half a minute for each."""
    yield from _dense(setup, setup.few, False)


def _dense(setup: Setup, grids: dict[str, Grid], flex: bool) -> Iterator[Case]:
    def measure(grid: Grid, batch: int) -> Row:
        layers, _ = ways.case(setup, grid, batch, SETTINGS["64, paper"])
        return {"visual_tokens": layers.tokens, "us": ways.dense(setup, layers, flex)}

    yield from _cases(measure, grids, setup.batches)


def steps(setup: Setup) -> Iterator[Case]:
    """A step, selection included; and the bandwidth of the decode kernel alone."""
    for name in SETTINGS_OF_STEPS:
        yield from _cases(_step(setup, name, True, True), _grids(setup, setup.sizes), setup.batches, name)


def bandwidth(setup: Setup) -> Iterator[Case]:
    """The decode kernel alone where it reads 32 MB."""
    for name in SETTINGS:
        yield from _cases(_step(setup, name, False, True), _grids(setup, setup.middle), setup.batches[:1], name)


def few_tokens(setup: Setup) -> Iterator[Case]:
    """Sequences so short that selecting may cost more than it saves: where to set `min_visual_tokens`."""
    for name in (WHOLE, *WANTED, DEFAULTS):
        yield from _cases(_step(setup, name, True, False), setup.few, setup.batches, name)


def _step(setup: Setup, name: str, whole: bool, alone: bool) -> Callable[[Grid, int], Row]:
    def measure(grid: Grid, batch: int) -> Row:
        config = SETTINGS_OF_STEPS[name]
        layers, plan = ways.case(setup, grid, batch, config)
        row: Row = {"visual_tokens": layers.tokens, "budget": config.budget}
        if whole:
            row["step_us"] = 1e3 * graph_ms(ways.gaze(layers, plan, setup.score_mod))
        if alone:
            read = layers.bytes_read(plan)
            moved = read["selected"] + read["text"] + read["mean_values"]
            row["decode_us"] = 1e3 * graph_ms(ways.attentions(setup, layers, plan))
            row |= {"selected_mb": read["selected"] / 1e6, "read_mb": moved / 1e6}
            row["decode_gbs"] = moved / row["decode_us"] / 1e3
        return row

    return measure


def selection(setup: Setup) -> Iterator[Case]:
    """The selection alone, and the step that it is part of."""

    def measure(name: str, grid: Grid, batch: int) -> Row:
        # More layers than a step needs: their mean keys alone are what the cache must not hold.
        layers, plan = ways.case(setup, grid, batch, SETTINGS[name], "mean_keys")
        read = layers.bytes_read(plan)
        alone = 1e3 * graph_ms(ways.selections(setup, layers, plan))
        whole = 1e3 * graph_ms(ways.gaze(layers, plan, setup.score_mod))
        return {
            "regions": layers.regions.start.shape[1],
            "select_us": alone,
            "mean_keys_gbs": read["mean_keys"] / alone / 1e3,
            "step_us": whole,
            "of_step": alone / whole,
        }

    sizes = {size: frames for size, frames in setup.sizes.items() if size != "8k"}
    for name in (*WANTED, DEFAULTS):
        yield from _cases(
            lambda grid, batch, name=name: measure(name, grid, batch), _grids(setup, sizes), setup.batches, name
        )


def _grids(setup: Setup, frames: dict[str, int]) -> dict[str, Grid]:
    return {size: setup.grid(count) for size, count in frames.items()}


def _cases(
    measure: Callable[[Grid, int], Row], grids: dict[str, Grid], batches: Iterable[int], settings: str | None = None
) -> Iterator[Case]:
    for batch, (size, grid) in itertools.product(batches, grids.items()):

        def found(grid: Grid = grid, batch: int = batch) -> Row:
            try:
                return measure(grid, batch)
            finally:
                free()

        yield Case(({} if settings is None else {"settings": settings}) | {"batch": batch, "visual": size}, found)
