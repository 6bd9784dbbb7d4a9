"""What gaze attention saves on a GPU: `python benchmarks/decode_gpu.py [--only TABLE] [--seconds S] [--dry-run]`.

Steps are timed as replays of CUDA graphs: of attention alone (with random entries, over so many layers that none finds
its own in the L2 cache; appending the new entry is left out on both sides) and of a whole model. Medians.

Every row is kept in `benchmarks/results/decode_gpu.*` as it comes, and a later call measures only what is missing: a
run that is cut short, or stops by itself with `--seconds`, is called again. Rows of another machine, other versions or
other kernels are put aside under another name, and never mixed. At the end comes the verdict: every figure that is
wanted, and what was measured.

`--dry-run` runs all tables with small sizes wherever it is, kernels interpreted, and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import checkout
import torch
from answer_gpu import answers
from attention_tables import (
    Case,
    bandwidth,
    check,
    dense,
    few_dense,
    few_tokens,
    selection,
    steps,
    triad,
)
from comparing import against_dense, dense_ways, kernels, models_against_dense
from kept import Kept, Row, kernels_digest, table
from model_step import Models, model_compiled, model_step
from on_gpu import first_line, machine
from prefill_gpu import prefill
from profiles import profile
from shapes import Setup, full, tiny
from verdict import summary, verdict

RESULTS = Path(__file__).parent / "results"
#: Exit status of a run that has rows left to measure.
UNFINISHED = 3

#: In the order of what they are worth to somebody whose time on the GPU is short, with the seconds that they may take
#: on an H100. Nobody has measured that: 17 minutes in all, a third of which is compilers.
TABLES: dict[str, int] = {
    "check": 60,
    "triad": 5,
    "steps": 120,
    "dense": 150,  # FlexAttention compiles for 6 shapes
    "selection": 40,
    "model_step": 180,
    "bandwidth": 15,
    "few_dense": 30,
    "few_tokens": 80,
    "prefill": 70,
    "answers": 60,
    "profile": 90,
    "model_compiled": 150,
}


def cases(name: str, setup: Setup, models: Models, tables: dict[str, list[Row]]) -> Iterable[Case]:
    """Of a table."""
    of_attention: dict[str, Callable[[Setup], Iterable[Case]]] = {
        each.__name__: each for each in (check, triad, steps, dense, selection, bandwidth, few_dense, few_tokens)
    }
    if name in of_attention:
        return of_attention[name](setup)
    if name == "model_compiled":
        return model_compiled(setup, models, tables)
    return {"model_step": model_step, "prefill": prefill, "answers": answers, "profile": profile}[name](setup, models)


def derived(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """What follows from the rows."""
    return {
        "dense ways": dense_ways(tables),
        "attention against dense": against_dense(tables),
        "whole steps against dense": models_against_dense(tables.get("model_step", [])),
        "whole steps, compiled": models_against_dense(tables.get("model_compiled", [])),
        "kernels of a step": kernels(tables),
        "verdict": verdict(tables),
    }


def measure(kept: Kept, setup: Setup, names: Iterable[str], seconds: float = float("inf"), again: bool = False) -> bool:
    """Measure what is missing in these tables; False: the time was over before that.

    A row that failed is kept with its error, and one that had no room or no profiler with the reason; both are measured
    anew only with `again`.
    """
    began, models = time.perf_counter(), Models(setup)
    for name in names:
        before = time.perf_counter()
        for case in cases(name, setup, models, kept.tables):
            held = kept.has(name, case.key)
            if held is not None and not _unfinished(held, again or name == "check"):
                continue
            if time.perf_counter() - began > seconds:
                return False
            row = kept.add(name, case.key, _measured(case))
            print(f"  {name}: {row}", file=sys.stderr, flush=True)
            if name == "check" and "error" in row:
                raise SystemExit(f"the kernels are wrong here, nothing else is timed: {row}")
            _check_device(setup)
        took = f"{time.perf_counter() - before:.0f} s, about {TABLES[name]} were expected of all its rows"
        print(f"{name}: {took}", file=sys.stderr, flush=True)
    return True


def _unfinished(held: Row, again: bool) -> bool:
    return again and ("error" in held or "skipped" in held)


def _measured(case: Case) -> Row:
    try:
        return case.measure()
    except Exception as error:  # one row that fails must not cost the others
        return {"error": first_line(error)}


def _check_device(setup: Setup) -> None:
    if setup.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.empty(1, device=setup.device).normal_()  # which fails for good after a capture that broke off
    except RuntimeError as error:
        raise SystemExit(
            f"the GPU is lost to this process ({first_line(error)}): the row above is kept with its error; call again "
            "to go on after it, with --again to try it once more"
        ) from None


def interpreted() -> None:
    """Start over with Triton's interpreter, which has to be asked for before Triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def dry_run(device: torch.device, names: Iterable[str]) -> dict[str, list[Row]]:
    """All tables at small sizes. Raises SystemExit when a row that should have come did not."""
    setup = tiny(device)
    with tempfile.TemporaryDirectory() as folder:
        kept = Kept(Path(folder), machine(device), "dry run", derived=derived)
        measure(kept, setup, names)
        kept.write()
    failed = [(name, row) for name, rows in kept.tables.items() for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"dry run: {len(failed)} rows failed, the first in {failed[0][0]}: {failed[0][1]}")
    return kept.tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TABLES, action="append", help="this table alone; may be repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row when these are over")
    parser.add_argument("--again", action="store_true", help="measure rows anew that failed or did not fit")
    parser.add_argument("--anew", action="store_true", help="put the results that are there aside and start over")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, nothing kept; needs no GPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in TABLES if not options.only or name in options.only]
    if options.dry_run:
        if device.type != "cuda":
            interpreted()
        tables, done = dry_run(device, names), True
    elif device.type != "cuda":
        raise SystemExit("needs a GPU, found none: --dry-run runs everything at small sizes without one")
    else:
        digest = kernels_digest(checkout.ROOT / "gazepatch")
        kept = Kept(options.results, machine(device), digest, options.anew, derived)
        if kept.said:
            print(kept.said, file=sys.stderr, flush=True)
        done = measure(kept, full(device), names, options.seconds, options.again)
        tables = kept.tables
    if options.json:
        print(json.dumps({"machine": machine(device), "tables": tables, "derived": derived(tables)}, indent=1))
    elif not options.dry_run:
        shown = {**{name: tables.get(name, []) for name in names}, **derived(tables)}
        print("\n\n".join(f"{name}\n{table(rows)}" for name, rows in shown.items() if rows))
    if options.dry_run:
        ran = ", ".join(f"{name} {len(rows)}" for name, rows in tables.items())
        print(f"dry run: every row came ({ran}); the times mean nothing", file=sys.stderr)
        return
    last = "all that was asked for is there" if done else "the time is over: call again to go on"
    print(f"{last}; figures reached: {summary(verdict(tables))}", file=sys.stderr)
    if not done:
        raise SystemExit(UNFINISHED)


if __name__ == "__main__":
    main()
