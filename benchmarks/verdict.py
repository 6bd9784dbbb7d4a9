"""What was wanted of the kernels on one H100 or H200, and whether it was reached. A pure function of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from comparing import EVEN, Tables, against_dense, break_even, models_against_dense
from kept import Row, row_of
from shapes import DEFAULTS, WANTED

#: Times of the best dense attention, by batch and visual tokens.
ATTENTION = {
    (1, "8k"): 1.3,
    (1, "32k"): 3.0,
    (1, "128k"): 6.0,
    (16, "8k"): 6.0,
    (16, "32k"): 7.5,
    (16, "128k"): 8.3,
}
#: Microseconds of a selection at batch 1, and its share of the largest step.
SELECTION, SHARE = {"32k": 5.0, "128k": 8.0}, 0.10
#: Times of the best dense decode step of a whole model, by batch.
MODEL = {1: 1.35, 8: 3.0}
#: Shares of the triad, where so many megabytes are selected.
TRIAD = {200.0: 0.85, 32.0: 0.75}
#: Share of a prompt's time that the patch may add.
PREFILL = 0.01

#: Fewer visual tokens than this are nobody's reason to patch a model.
FEWEST = 256


class Value(NamedTuple):
    """A figure, and the row that it is of. Without a number: why there is none."""

    number: float | None
    where: str


def verdict(tables: Tables) -> list[Row]:
    """A row for every figure that is wanted: of all settings that are meant, the worst is what was measured."""
    compared = against_dense(tables)
    return [
        *_bandwidth(tables),
        *_attention(tables, compared),
        *_selection(tables),
        *_models(tables),
        *_prefill(tables),
        *_few(tables, compared),
    ]


def judged(figure: str, wanted: float, values: Sequence[Value], beside: Value | None, at_least: bool = True) -> Row:
    """A row of the verdict.

    Args:
        figure: Its name.
        wanted: The bound.
        values: What all settings that are meant gave.
        beside: What the defaults gave, which are not meant.
        at_least: Whether more is better.
    """
    there = [value for value in values if value.number is not None]
    worst = (min if at_least else max)(there, key=lambda value: value.number) if there else None
    failed = worst is not None and not (worst.number >= wanted if at_least else worst.number <= wanted)
    missing = [value.where for value in values if value.number is None]
    reached = "no" if failed else "not measured" if missing or not values else "yes"
    where = [] if worst is None else [worst.where]
    return {
        "figure": figure,
        "wanted": f"{'>=' if at_least else '<='} {wanted:g}",
        "measured": None if worst is None or worst.number == math.inf else worst.number,
        "reached": reached,
        "the_defaults": None if beside is None else beside.number,
        "where": "; ".join([*where, *(reason for reason in missing if reached != "yes")]) or "no rows",
    }


def _value(row: Row | None, column: str, called: str) -> Value:
    if row is None:
        return Value(None, f"{called}: no row")
    if row.get(column) is None:
        return Value(None, f"{called}: {row.get('error') or row.get('skipped') or 'not in the row'}")
    said = row.get("best_dense")
    return Value(row[column], f"{called}{f', against {said}' if said else ''}")


def _of_settings(find: Callable[[str], Value]) -> tuple[list[Value], Value]:
    return [find(name) for name in WANTED], find(DEFAULTS)


def _bandwidth(tables: Tables) -> Iterable[Row]:
    triad = (tables.get("triad") or [{}])[0].get("triad_gbs")
    rows = [row for name in ("steps", "bandwidth") for row in tables.get(name, ()) if "decode_gbs" in row]
    bounds = sorted(TRIAD, reverse=True)
    for minimum, below in zip(bounds, [math.inf, *bounds], strict=False):

        def worst(name: str, minimum: float = minimum, below: float = below) -> Value:
            of = [row for row in rows if row["settings"] == name and minimum <= row["selected_mb"] < below]
            if not of or not triad:
                return Value(None, f"{name}: no row")
            row = min(of, key=lambda row: row["decode_gbs"])
            return Value(row["decode_gbs"] / triad, f"{name}, batch {row['batch']}, {row['visual']}")

        values, beside = _of_settings(worst)
        yield judged(f"decode kernel, share of the triad, from {minimum:g} MB", TRIAD[minimum], values, beside)


def _attention(tables: Tables, compared: list[Row]) -> Iterable[Row]:
    for (batch, size), wanted in ATTENTION.items():

        def ratio(name: str, batch: int = batch, size: str = size) -> Value:
            key = {"settings": name, "batch": batch, "visual": size}
            row = row_of(compared, **key)
            if row is None and (failed := row_of(tables.get("steps", ()), **key)) is not None and "error" in failed:
                row = failed
            return _value(row, "over_best_dense", name)

        yield judged(f"attention over the best dense, batch {batch}, {size}", wanted, *_of_settings(ratio))


def _selection(tables: Tables) -> Iterable[Row]:
    rows = tables.get("selection", ())

    def of(column: str, batch: int, size: str) -> tuple[list[Value], Value]:
        return _of_settings(lambda name: _value(row_of(rows, settings=name, batch=batch, visual=size), column, name))

    for size, wanted in SELECTION.items():
        yield judged(f"selection, microseconds, batch 1, {size}", wanted, *of("select_us", 1, size), at_least=False)
    yield judged("selection, share of the step, batch 16, 128k", SHARE, *of("of_step", 16, "128k"), at_least=False)


def _models(tables: Tables) -> Iterable[Row]:
    rows = tables.get("model_step", [])
    compared = models_against_dense(rows)
    for batch, wanted in MODEL.items():

        def ratio(name: str, batch: int = batch) -> Value:
            row = row_of(compared, settings=name, batch=batch, visual="128k")
            if row is None:  # the side that has no time says why
                sides = [row_of(rows, side=side, batch=batch, visual="128k") for side in (name, "dense")]
                row = next((side for side in sides if side and ("error" in side or "skipped" in side)), None)
            return _value(row, "over_best_dense", name)

        yield judged(f"whole step over the best dense, batch {batch}, 128k", wanted, *_of_settings(ratio))


def _prefill(tables: Tables) -> Iterable[Row]:
    rows = tables.get("prefill", ())
    values = [_value(row_of(rows, visual=size), "overhead", size) for size in ("8k", "32k")]
    yield judged("prompt, share of its time that the patch adds", PREFILL, values, None, at_least=False)


def _few(tables: Tables, compared: list[Row]) -> Iterable[Row]:
    def rows(name: str) -> list[Row]:
        return [row for row in compared if row["settings"] == name and row["visual_tokens"] >= FEWEST]

    def lowest(name: str) -> Value:
        if not tables.get("few_tokens") or not (of := rows(name)):
            return Value(None, f"{name}: no row")
        row = min(of, key=lambda row: row["over_best_dense"])
        return _value(row, "over_best_dense", f"{name}, batch {row['batch']}, {row['visual_tokens']} visual tokens")

    def start(name: str) -> Value:
        of = rows(name)
        if all(row["visual_tokens"] > FEWEST for row in of):
            return Value(None, f"{name}: no row of {FEWEST} tokens")
        found = break_even(of)
        return Value(math.inf if found is None else float(found), name)

    yield judged(f"attention over the best dense, anywhere from {FEWEST} tokens", EVEN, *_of_settings(lowest))
    called = f"visual tokens from which it is never below {EVEN} (min_visual_tokens)"
    yield judged(called, float(FEWEST), *_of_settings(start), at_least=False)


def summary(rows: Iterable[Row]) -> str:
    """One line."""
    counts: dict[str, Any] = {}
    for row in rows:
        counts[row["reached"]] = counts.get(row["reached"], 0) + 1
    return ", ".join(f"{reached}: {count}" for reached, count in sorted(counts.items()))
