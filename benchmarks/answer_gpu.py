"""How long a token of `generate` takes as most people call it: a dynamic cache, no graphs, no compiler.

After a short prompt the host is what a step waits for, and not the memory: there it shows what a patch costs in Python
and in launches. The model has Qwen2.5-VL-7B's shape and random weights, its vision tower gives features that are made
before. All sides answer in turn within a round; a side's time is the median over the tokens after the first of all
rounds, and ratios are medians of the rounds' own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from attention_tables import Case
from model_step import Models
from prefill_gpu import prompts, without_tower
from shapes import DEFAULTS, SETTINGS, WANTED, Setup
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.patch import patched

#: Sides by name; None is the unpatched model.
SIDES: Mapping[str, GazeConfig | None] = {"dense": None, **{name: SETTINGS[name] for name in (*WANTED, DEFAULTS)}}

Row = dict[str, Any]


class Clock:
    """Notes when each token comes: `generate` hands it on as to somebody who reads along."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """The prompt, and then every token, on the host already."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The answer is over."""

    def milliseconds(self) -> list[float]:
        """Of every token after the first."""
        _, *times = self.times
        return [1e3 * (later - before) for before, later in itertools.pairwise(times)]


def answer(model: Any, inputs: Mapping[str, Any], tokens: int) -> list[float]:
    """Milliseconds of the tokens of one answer."""
    clock = Clock()
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    return clock.milliseconds()


@torch.no_grad()
def rounds_of(
    model: Any, inputs: Mapping[str, Any], features: Tensor, rounds: int, tokens: int
) -> dict[str, list[list[float]]]:
    """Milliseconds of every side's tokens in every round; a first round only compiles the kernels."""
    taken: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    with without_tower(model, features):
        for turn in range(1 + rounds):
            for name, config in SIDES.items():
                with nullcontext() if config is None else patched(model, config):
                    times = answer(model, inputs, tokens if turn else 3)
                if turn:
                    taken[name].append(times)
    return taken


def summarised(taken: Mapping[str, list[list[float]]]) -> Row:
    """Milliseconds a token of every side, and how many times faster than dense it is."""
    medians = {name: [statistics.median(times) for times in rounds] for name, rounds in taken.items()}
    row: Row = {}
    for name, rounds in taken.items():
        row[f"{name}, ms"] = statistics.median(itertools.chain.from_iterable(rounds))
    for name in medians:
        if name != "dense":
            ratios = [dense / ours for dense, ours in zip(medians["dense"], medians[name], strict=True)]
            row[f"{name}, over dense"] = statistics.median(ratios)
    return row


def answers(setup: Setup, models: Models) -> Iterator[Case]:
    """A row for every size of a prompt."""
    rounds, tokens = (3, 33) if setup.device.type == "cuda" else (1, 4)

    def run(model: Any, inputs: dict[str, Any], features: Tensor) -> Row:
        del inputs["position_ids"]  # `generate` makes them
        return summarised(rounds_of(model, inputs, features, rounds, tokens))

    return prompts(setup, models, run)
