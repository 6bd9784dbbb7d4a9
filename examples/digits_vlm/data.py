"""Boards and questions about them as token sequences, in batches.

Letters in shapes as in `scenes.py`, and `T` text tokens, `S` all tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from questions import Question, ask
from scenes import Digits, Scene, digits, draw
from torch import Tensor
from words import IMAGE, PAD, START, Board

IGNORED = -100


@dataclass
class Batch:
    """Sequences ready for a model.

    Attributes:
        scene: What was drawn.
        questions: Those of each sequence, in order.
        ids: `[B, S]` the start, the visual tokens, the questions with their answers, padding on the right.
        labels: `[B, T]` answer tokens where they stand in the text, `IGNORED` elsewhere.
        turn: `[B, T]` number of the question that an answer token belongs to, -1 elsewhere.
    """

    scene: Scene
    questions: list[list[Question]]
    ids: Tensor
    labels: Tensor
    turn: Tensor

    @property
    def text_tokens(self) -> int:
        """`T`."""
        return self.labels.shape[1]

    def pixel_values(self, blind: bool = False) -> Tensor:
        """`[B * F, 3, P, P]` as the image processor makes them; zeros, a plain grey, when `blind`."""
        values = normalise(self.scene.pixels.flatten(0, 1))
        return torch.zeros_like(values) if blind else values


def normalise(pixels: Tensor) -> Tensor:
    """Pixels of 8 bits as the image processor makes them: from -1 to 1."""
    return pixels.float() / 127.5 - 1


def pack(board: Board, scene: Scene, questions: list[list[Question]]) -> Batch:
    """Put the questions of each sequence after its visual tokens."""
    words, device = board.vocabulary(), scene.pixels.device
    texts, labels, turns = [], [], []
    for row in questions:
        text: list[int] = []
        label: list[int] = []
        turn: list[int] = []
        for i, question in enumerate(row):
            asked = [words[word] for word in (*question.words, "=")]
            answer = [words[word] for word in question.answer]
            text += asked + answer
            label += [IGNORED] * len(asked) + answer
            turn += [-1] * len(asked) + [i] * len(answer)
        texts.append(text)
        labels.append(label)
        turns.append(turn)
    text_ids = _padded(texts, words[PAD], device)
    visual = text_ids.new_full((len(texts), board.tokens * scene.tints.shape[1]), words[IMAGE])
    start = text_ids.new_full((len(texts), 1), words[START])
    ids = torch.cat([start, visual, text_ids], 1)
    return Batch(scene, questions, ids, _padded(labels, IGNORED, device), _padded(turns, -1, device))


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)


def make_batch(
    board: Board,
    source: Digits,
    batch: int,
    counts: Mapping[str, int],
    generator: torch.Generator,
    rng: random.Random,
    striped: bool = False,
) -> Batch:
    """Random boards with random questions; several frames if `counts` asks for the task `frame`."""
    frames = board.frames if counts.get("frame") else 1
    scene = draw(board, source, batch, frames, generator, striped)
    on_host = Scene(*(part.cpu() if i else part for i, part in enumerate(scene)))  # the questions read them one by one
    return pack(board, scene, [ask(on_host, row, counts, rng) for row in range(batch)])


#: Questions of an evaluation sequence: about one board, about several frames.
EVALUATION = ({"digit": 4, "colour": 3, "row": 2, "more": 3, "most": 1}, {"frame": 12})


def evaluation_set(
    board: Board, sequences: int = 256, batch: int = 32, seed: int = 1, device: torch.device | str = "cpu"
) -> list[Batch]:
    """The same boards and questions on every machine, with digits that training never saw.

    Args:
        board: Size of the boards.
        sequences: How many of one board, and how many of several frames.
        batch: Sequences of a batch.
        seed: Which set.
        device: Where to put it; it is drawn on the CPU.
    """
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    sizes = [min(batch, sequences - i) for i in range(0, sequences, batch)]
    made = [make_batch(board, digits()[1], size, counts, generator, rng) for counts in EVALUATION for size in sizes]
    return [
        Batch(Scene(*(x.to(device) for x in b.scene)), b.questions, *(x.to(device) for x in (b.ids, b.labels, b.turn)))
        for b in made
    ]
