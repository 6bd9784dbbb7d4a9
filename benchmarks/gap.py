"""How much of the gap between gaze and dense a training closes: conversations in, figures out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from timing import machine

import gazepatch


def write_conversations(folder: Path, name: str, records: Iterable[Mapping[str, Any]]) -> Path:
    """Write `name.jsonl` into the folder, a line a conversation."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Gap:
    """Scores on conversations that were held out, and what the training between them cost.

    Args:
        args: Of the command line, which are kept with the figures. With `json` these are printed at the end, else one
            by one, so that an interrupted training leaves those from before it.
        processor: The model's.
        held_out: Conversations to measure on.
    """

    def __init__(self, args: argparse.Namespace, processor: Any, held_out: Path) -> None:
        self.as_json, self.processor, self.held_out = args.json, processor, held_out
        self.figures = {name: value for name, value in vars(args).items() if name not in ("folder", "json")}

    def measure(self, name: str, model: Any) -> None:
        """Score a patched model."""
        (score,) = gazepatch.evaluate(model, self.processor, self.held_out)
        self.figures[name] = asdict(score)
        if not self.as_json:
            print(f"{name:28s} {asdict(score)}", flush=True)

    def measure_untrained(self, model: Any, config: gazepatch.GazeConfig) -> None:
        """Score a model as it is, and with context tokens that a training would start from."""
        with gazepatch.patched(model, replace(config, context_tokens=0)):
            self.measure("untrained", model)
        tokens = gazepatch.initial_context_tokens(model, config.context_tokens)
        with gazepatch.patched(model, config, context_tokens=tokens):
            self.measure("untrained context tokens", model)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Time what happens inside."""
        began, cpu = time.perf_counter(), time.process_time()
        yield
        self.figures["training_s"] = time.perf_counter() - began
        self.figures["training_cpu_s"] = time.process_time() - cpu

    def close(self, trained: Any) -> None:
        """Score the trained model, and print what is not printed yet."""
        self.measure("trained", trained)
        before, after = (self.figures[name]["agreement"] for name in ("untrained", "trained"))
        self.figures["share_of_gap_closed"] = (after - before) / (1 - before)
        if self.as_json:
            print(json.dumps(self.figures | {"machine": machine()}, indent=2))
            return
        seconds, cpu, closed = (self.figures[name] for name in ("training_s", "training_cpu_s", "share_of_gap_closed"))
        print(f"{seconds:.0f} s of training, {cpu:.0f} s of CPU, close {closed:.0%} of the gap")
        print(machine())
