"""Tables that follow from what was measured: gaze against the best dense way. Pure functions of the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from kept import Row, row_of
from shapes import WHOLE

Tables = dict[str, list[Row]]

#: What is no slower than this against dense attention costs nothing that anybody would notice.
EVEN = 0.97


class Best(NamedTuple):
    """The fastest dense way, its time, and transformers' own; what fails or does not fit has none."""

    way: str
    time: float
    transformers: float | None


def best(times: dict[str, Any]) -> Best | None:
    """Of times by way, among reasons why others have none."""
    found = {way: time for way, time in times.items() if isinstance(time, (int, float))}
    if not found:
        return None
    way = min(found, key=found.__getitem__)
    return Best(way, found[way], found.get("transformers"))


def against_dense(tables: Tables) -> list[Row]:
    """Attention alone: every step that was measured at a size where dense ways were."""
    rows = [*tables.get("steps", ()), *tables.get("few_tokens", ())]
    dense = [*tables.get("dense", ()), *tables.get("few_dense", ())]
    triad = tables.get("triad") or [{}]
    compared = []
    for row in rows:
        place = {"batch": row["batch"], "visual": row["visual"]}
        others, whole = row_of(dense, **place), row_of(rows, settings=WHOLE, **place)
        if row["settings"] == WHOLE or "step_us" not in row or others is None or "us" not in others:
            continue
        ways = {**others["us"], **({WHOLE: whole["step_us"]} if whole is not None and "step_us" in whole else {})}
        if (fastest := best(ways)) is None:
            continue
        step = row["step_us"]
        found = {
            "settings": row["settings"],
            **place,
            "visual_tokens": row.get("visual_tokens"),
            "step_us": step,
            "best_dense": fastest.way,
            "best_dense_us": fastest.time,
            "over_best_dense": fastest.time / step,
            "over_transformers": fastest.transformers / step if fastest.transformers else None,
        }
        if "decode_gbs" in row and triad[0].get("triad_gbs"):
            found["of_triad"] = row["decode_gbs"] / triad[0]["triad_gbs"]
        compared.append(found)
    return compared


def models_against_dense(rows: list[Row]) -> list[Row]:
    """Whole steps: of a size and batch, gaze against the best dense way of the same model.

    That our own kernel reads everything is a dense way as well, on the cache of a patched model.
    """
    compared = []
    for row in rows:
        place = {"batch": row["batch"], "visual": row["visual"]}
        if row["side"] in ("dense", WHOLE) or "ms" not in row:
            continue
        others, whole = row_of(rows, side="dense", **place), row_of(rows, side=WHOLE, **place)
        ways = dict((others or {}).get("dense_ms", {}))
        if ways and whole is not None and "ms" in whole:
            ways[WHOLE] = whole["ms"]
        if (fastest := best(ways)) is None:
            continue
        compared.append(
            {
                "settings": row["side"],
                **place,
                "gaze_ms": row["ms"],
                "best_dense": fastest.way,
                "best_dense_ms": fastest.time,
                "over_best_dense": fastest.time / row["ms"],
                "over_transformers": fastest.transformers / row["ms"] if fastest.transformers else None,
            }
        )
    return compared


def break_even(compared: Iterable[Row]) -> int | None:
    """The smallest number of visual tokens from which no step that was measured is slower than `EVEN`; None: none."""
    worst: dict[int, float] = {}
    for row in compared:
        tokens = row["visual_tokens"]
        worst[tokens] = min(worst.get(tokens, row["over_best_dense"]), row["over_best_dense"])
    found = None
    for tokens in sorted(worst, reverse=True):
        if worst[tokens] < EVEN:
            break
        found = tokens
    return found


def dense_ways(tables: Tables) -> list[Row]:
    """Every dense way with its time, or the reason why it has none, a row for each."""
    found = []
    for name, column in (
        ("dense", "us"),
        ("few_dense", "us"),
        ("model_step", "dense_ms"),
        ("model_compiled", "dense_ms"),
    ):
        for row in tables.get(name, ()):
            for way, time in row.get(column, {}).items():
                figure = {column: time} if isinstance(time, (int, float)) else {"failed": time}
                found.append({"table": name, "batch": row["batch"], "visual": row["visual"], "way": way, **figure})
    return found


def kernels(tables: Tables) -> list[Row]:
    """The profile, a row for every kernel."""
    found = []
    for row in tables.get("profile", ()):
        of = {name: value for name, value in row.items() if name not in ("kernels", "gpu")}
        recorded = row.get("kernels", {})
        for name, each in recorded.items():
            found.append({**of, "launches": each["launches"], "us": each["us"], "kernel": name})
    return found
