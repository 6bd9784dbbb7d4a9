"""Where the model that was trained with gaze looks for the first word of an answer: share of its reads by board row.

    python examples/digits_vlm/where.py

Every layer and key head reads an eighth of the regions, a cell each. Evenly spread, a row of the board gets 12.5 %.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from data import EVALUATION, pack
from model import PRESETS
from packages import require
from questions import Question, ask
from scenes import Scene, digits, draw
from torch import Tensor
from transformers import DynamicCache

import gazepatch
from gazepatch.caches.name import CACHE

MODEL = Path(__file__).parent / "models" / "gaze"
BOARD = PRESETS["cpu"].board
TASKS = ("digit", "row", "more", "most")


def questions_of(scene: Scene, task: str, rng: random.Random) -> list[list[Question]]:
    """One question of a task for each board; boards that have none are asked for nothing."""
    found = [[q for q in ask(scene, row, EVALUATION[0], rng) if q.task == task] for row in range(len(scene.tints))]
    return [of_board[:1] for of_board in found]


@torch.no_grad()
def rows_read(model: Any, scene: Scene, asked: list[list[Question]]) -> Tensor:
    """`[8]` share of the reads in each row of the board, by the `=` that the answer follows."""
    chosen = [i for i, of_board in enumerate(asked) if of_board]
    batch = pack(BOARD, Scene(*(part[chosen] for part in scene)), [asked[i] for i in chosen])
    stop = batch.ids.shape[1] - batch.text_tokens + len(asked[chosen[0]][0].words)
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=batch.ids[:, :stop], pixel_values=batch.pixel_values(), **{CACHE: cache})
    with gazepatch.trace(model) as trace:
        model(input_ids=batch.ids[:, stop : stop + 1], **{CACHE: cache})
    (step,) = trace.steps
    regions = torch.cat([torch.as_tensor(row).flatten() for layer in step.values() for row in layer])
    return torch.bincount(regions // BOARD.cells, minlength=BOARD.cells) / len(regions)


def main() -> None:
    """Parse the command line, which has no options, and print a line for each task."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    require("sklearn")
    model: Any = gazepatch.load(MODEL, dtype=torch.float32).eval()
    scene = draw(BOARD, digits()[1], 64, 1, torch.Generator().manual_seed(1))
    print("rows of the board, first to last, in per cent of what is read")
    for task in TASKS:
        shares = rows_read(model, scene, questions_of(scene, task, random.Random(1)))
        print(f"{task:8s}", *(f"{100 * share:5.1f}" for share in shares.tolist()))


if __name__ == "__main__":
    main()
