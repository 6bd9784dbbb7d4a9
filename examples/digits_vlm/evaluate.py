"""Measure the shipped models on held-out digits: dense, gaze, and other ways to read less, at several budgets.

Writes the table of `results.md` and its plot, or prints JSON. Every question is scored by whether greedy decoding
writes exactly its answer; answers are found in one forward for all questions of a sequence, text queries routed from
the first on (`prefill="gaze"`), so that the first word of an answer gazes as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import Batch, evaluation_set
from memory import keep_memory
from model import PRESETS
from packages import require
from policies import POLICIES, reading_by
from report import COLUMNS, write
from train import by_cells, measure
from transformers import AutoModelForImageTextToText
from words import Board

import gazepatch

HERE = Path(__file__).parent
SHARES = (1.0, 0.5, 0.25, 0.125, 0.06)


def dense_rows(model: Any, board: Board, batches: list[Batch], show: Callable[..., None]) -> None:
    """Everything that is done to the model that was trained densely."""
    show("dense", 1.0, measure(model, batches))
    show("dense, blind", 1.0, measure(model, batches, blind=True))
    for share in SHARES[1:]:
        for name, periphery in (("gaze untrained", False), ("gaze untrained, periphery", True)):
            with gazepatch.patched(model, by_cells(board, budget=share, periphery=periphery)):
                show(name, share, measure(model, batches))
        for name, policy in POLICIES.items():
            show(name, share, measure(model, batches, partial(reading_by, model, policy, board, share)))


def gaze_rows(folder: Path, board: Board, batches: list[Batch], show: Callable[..., None], name: str) -> None:
    """The model that was trained with gaze, at the budget it was trained for and at others."""
    model: Any = gazepatch.load(folder, dtype=torch.float32).eval()
    tokens = gazepatch.context_tokens_of(model)
    count = 0 if tokens is None else len(tokens)
    gazepatch.restore(model)
    for share in SHARES:
        with gazepatch.patched(model, by_cells(board, budget=share, context_tokens=count), context_tokens=tokens):
            show(name, share, measure(model, batches))
            if share == 0.125:
                show(f"{name}, blind", share, measure(model, batches, blind=True))
        if count and share < 1:
            with gazepatch.patched(model, by_cells(board, budget=share)):
                show(f"{name}, context tokens taken away", share, measure(model, batches))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=HERE / "models", help="folder of dense, gaze, ...")
    parser.add_argument("--scale", choices=PRESETS, default="cpu")
    parser.add_argument("--sequences", type=int, default=64, help="of one board, and as many of several frames")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON lines and write nothing")
    args = parser.parse_args()
    require("sklearn", *(() if args.json else ("matplotlib",)))
    keep_memory()
    board = PRESETS[args.scale].board
    batches = evaluation_set(board, args.sequences, device=args.device)
    rows: list[dict[str, Any]] = []
    started = time.time()

    def show(reading: str, share: float, scores: dict[str, float]) -> None:
        rows.append({"reading": reading, "share": share, **scores})
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
        else:
            figures = "  ".join(f"{name} {100 * scores[name]:5.1f}" for name in COLUMNS)
            print(f"{time.time() - started:5.0f} s  {reading:42s} {100 * share:5.1f} %  {figures}", flush=True)

    dense: Any = AutoModelForImageTextToText.from_pretrained(args.models / "dense", dtype=torch.float32)
    dense_rows(dense.eval().to(args.device), board, batches, show)
    for folder in sorted(args.models.glob("gaze*")):
        name = "gaze trained" + folder.name.removeprefix("gaze").replace("-", " ")
        gaze_rows(folder, board, batches, show, name)
    if not args.json:
        write(HERE, rows, args.sequences)
        print(f"written to {HERE / 'results.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
