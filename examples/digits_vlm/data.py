"""Boards of real scanned digits, questions about them, and their packing into token sequences.

A board is a square of cells. Every cell holds one digit of scikit-learn's `load_digits` in one of six colours, the
board has a tint of its own, and noise and clutter lie around. Letters in shapes: `B` sequences, `F` boards (frames) of
a sequence, `n` cells along a side, `P` pixels along a side, `T` text tokens, `S` all tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.85, 0.2),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "cyan": (0.1, 0.9, 0.9),
    "magenta": (0.95, 0.25, 0.95),
}
NAMES = tuple(COLOURS)
TASKS = ("digit", "colour", "row", "column", "more", "most", "frame")
#: The tasks of the report: one cell, a line of cells, the whole board, one cell of one board among several.
GROUPS = {"T1": ("digit", "colour"), "T2": ("row", "column"), "T3": ("more", "most"), "T4": ("frame",)}
PAD, START, IMAGE = "<pad>", "<s>", "<image>"
HELD_OUT = 300
IGNORED = -100


@dataclass(frozen=True)
class Board:
    """Size of a board.

    Attributes:
        cells: Cells along a side.
        cell_tokens: Visual tokens along a side of a cell.
        patch: Pixels along a side of a visual token.
        frames: Boards of a sequence with several.
    """

    cells: int
    cell_tokens: int
    patch: int
    frames: int

    @property
    def side(self) -> int:
        """Visual tokens along a side."""
        return self.cells * self.cell_tokens

    @property
    def tokens(self) -> int:
        """Visual tokens."""
        return self.side**2

    @property
    def pixels(self) -> int:
        """Pixels along a side."""
        return self.side * self.patch

    def vocabulary(self) -> dict[str, int]:
        """Every word and its number."""
        lines = [f"{axis}{i}" for axis in "rc" for i in range(self.cells)]
        return {word: i for i, word in enumerate([PAD, START, IMAGE, "=", ".", *TASKS, *NAMES, *lines, *"0123456789"])}


class Digits(NamedTuple):
    """Scanned digits: `images` `[N, 8, 8]` from 0 to 1 and `labels` `[N]`."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Digits:
        """The same on another device."""
        return Digits(self.images.to(device), self.labels.to(device))


@lru_cache
def digits() -> tuple[Digits, Digits]:
    """The digits to train with, and those that only evaluation sees: 300 of the 1797, as many of each class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    parts = train_test_split(raw.images / 16, raw.target, test_size=HELD_OUT, stratify=raw.target, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Digits(train.float(), train_labels), Digits(test.float(), test_labels)


class Scene(NamedTuple):
    """Drawn boards.

    Attributes:
        pixels: `[B, F, 3, P, P]` of 8 bits, as an image file would hold them.
        digits: `[B, F, n, n]` the digit of each cell.
        colours: `[B, F, n, n]` its colour, an index of `NAMES`.
        tints: `[B, F]` colour of the ground, different in each frame of a sequence.
    """

    pixels: Tensor
    digits: Tensor
    colours: Tensor
    tints: Tensor


def draw(
    board: Board, source: Digits, batch: int, frames: int, generator: torch.Generator, striped: bool = False
) -> Scene:
    """Draw random boards on the generator's device, where `source` must be too.

    Striped boards are for beginners: half of them have equal rows and half equal columns, so that half an address
    finds the answer half of the time, and the whole address always.
    """
    device, n = generator.device, board.cells
    chosen = torch.randint(len(source.labels), (batch, frames, n, n), generator=generator, device=device)
    # Uneven shares of the colours, so that most boards have one that leads.
    shares = torch.rand(batch * frames, len(NAMES), generator=generator, device=device) + 0.05
    colours = shares.multinomial(n * n, replacement=True, generator=generator).view(batch, frames, n, n)
    if striped:
        chosen, colours = _stripe(chosen), _stripe(colours)
    order = torch.rand(batch, len(NAMES), generator=generator, device=device)
    tints = order.argsort(-1)[:, :frames]
    pixels = _paint(board, source.images[chosen.flatten()], colours.flatten(0, 1), tints.flatten(), generator)
    return Scene(pixels.view(batch, frames, *pixels.shape[1:]), source.labels[chosen], colours, tints)


def _stripe(cells: Tensor) -> Tensor:
    """The first row of the first half of `[B, F, n, n]` all over, and the first column of the second half."""
    half = len(cells) // 2
    parts = cells[:half, :, :1].expand_as(cells[:half]), cells[half:, :, :, :1].expand_as(cells[half:])
    return torch.cat(parts)


def _paint(board: Board, glyphs: Tensor, colours: Tensor, tints: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `[B, 3, P, P]` for glyphs `[B * n * n, 8, 8]`, colours `[B, n, n]` and tints `[B]`."""
    device, size = generator.device, board.pixels
    batch = len(tints)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    palette = torch.tensor(list(COLOURS.values()), device=device)
    ground = palette[tints] * uniform(0.15, 0.3, batch, 1)
    canvas = ground[:, :, None, None] + _strokes(board, batch, generator)
    ink = _warp(glyphs, board.cell_tokens * board.patch, generator)
    alpha = _tile(ink.view(batch, board.cells, board.cells, *ink.shape[1:])).unsqueeze(1)
    paint = palette[colours] * uniform(0.75, 1.0, *colours.shape, 1)
    cell = board.cell_tokens * board.patch
    paint = paint.permute(0, 3, 1, 2).repeat_interleave(cell, -1).repeat_interleave(cell, -2)
    canvas = torch.lerp(canvas, paint, alpha)
    specks = uniform(0, 1, batch, 1, size, size) < 0.005
    canvas = torch.where(specks, uniform(0, 1, batch, 1, size, size), canvas)
    noise = torch.randn(canvas.shape, generator=generator, device=device)
    return ((canvas + 0.04 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _warp(glyphs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift digits `[N, 8, 8]` into cells `[N, size, size]`."""
    count, device = len(glyphs), generator.device
    angle, scale, across, down = torch.rand(4, count, generator=generator, device=device).unbind(0)
    angle, scale = (angle - 0.5) * 0.3, 0.78 + 0.2 * scale
    room = 1.05 - scale  # to shift without losing much over the edge
    across, down = (2 * across - 1) * room, (2 * down - 1) * room
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2) / scale[:, None, None]
    shift = -turn @ torch.stack([across, down], -1).unsqueeze(-1)
    grid = F.affine_grid(torch.cat([turn, shift], -1), [count, 1, size, size], align_corners=False)
    return F.grid_sample(glyphs.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _tile(cells: Tensor) -> Tensor:
    """`[B, n, n, s, s]` to `[B, n * s, n * s]`."""
    batch, n, _, s, _ = cells.shape
    return cells.transpose(2, 3).reshape(batch, n * s, n * s)


def _strokes(board: Board, batch: int, generator: torch.Generator, count: int = 4) -> Tensor:
    """Faint grey line segments `[B, 1, P, P]`, about two cells long, which lie under the digits."""
    device, size = generator.device, board.pixels
    start, to = torch.rand(2, batch, count, 2, 1, 1, generator=generator, device=device)
    along = (to - 0.5) * 4 / board.cells
    axis = (torch.arange(size, device=device) + 0.5) / size
    point = torch.stack(torch.meshgrid(axis, axis, indexing="ij")) - start
    nearest = ((point * along).sum(2, keepdim=True) / (along.square().sum(2, keepdim=True) + 1e-6)).clamp(0, 1)
    near = (point - nearest * along).square().sum(2) < (0.7 / size) ** 2
    return 0.25 * near.any(1, keepdim=True).float()


class Question(NamedTuple):
    """`words` up to the `=`, and the `answer` with its full stop."""

    task: str
    words: list[str]
    answer: list[str]


def ask(scene: Scene, row: int, counts: Mapping[str, int], rng: random.Random) -> list[Question]:
    """Questions about the first board of a sequence in random order, or about all its frames.

    No answer can be copied from another, not even on a striped board: the cells asked for lie outside the lines asked
    for, each in a row and a column of its own.

    Args:
        scene: The boards.
        row: Which sequence.
        counts: How many of each task, where `row` stands for rows and columns.
        rng: Source of chance.
    """
    if wanted := counts.get("frame", 0):
        return _ask_frames(scene, row, wanted, rng)
    digit, colour = scene.digits[row, 0].tolist(), scene.colours[row, 0].tolist()
    n = len(digit)
    by_row = rng.random() < 0.5
    lines = rng.sample(range(n), counts.get("row", 0))
    free = [i for i in range(n) if i not in lines]
    rows, columns = (free, range(n)) if by_row else (range(n), free)

    def places(rows: Sequence[int], columns: Sequence[int], count: int) -> Iterable[tuple[int, int]]:
        return zip(rng.sample(rows, count), rng.sample(columns, count), strict=True)

    questions = [_cell("digit", r, c, str(digit[r][c])) for r, c in places(rows, columns, counts.get("digit", 0))]
    anywhere = places(range(n), range(n), counts.get("colour", 0))
    questions += [_cell("colour", r, c, NAMES[colour[r][c]]) for r, c in anywhere]
    questions += [_line(digit, i, by_row) for i in lines]
    tally = [sum(cells.count(i) for cells in colour) for i in range(len(NAMES))]
    pairs = [pair for pair in combinations(range(len(NAMES)), 2) if tally[pair[0]] != tally[pair[1]]]
    for pair in rng.sample(pairs, min(len(pairs), counts.get("more", 0))):
        more = max(pair, key=lambda i: tally[i])
        questions.append(Question("more", ["more", *(NAMES[i] for i in rng.sample(pair, 2))], [NAMES[more], "."]))
    if counts.get("most", 0) and tally.count(max(tally)) == 1:
        questions.append(Question("most", ["most"], [NAMES[tally.index(max(tally))], "."]))
    rng.shuffle(questions)
    return questions


def _cell(task: str, r: int, c: int, answer: str) -> Question:
    return Question(task, [task, f"r{r}", f"c{c}"], [answer, "."])


def _line(digit: list[list[int]], i: int, by_row: bool) -> Question:
    cells = digit[i] if by_row else [line[i] for line in digit]
    words = ["row", f"r{i}"] if by_row else ["column", f"c{i}"]
    return Question(words[0], words, [*map(str, cells), "."])


def _ask_frames(scene: Scene, row: int, count: int, rng: random.Random) -> list[Question]:
    digit, tints = scene.digits[row].tolist(), scene.tints[row].tolist()
    n = len(digit[0])
    places = [(f, r, c) for f in range(len(tints)) for r in range(n) for c in range(n)]
    return [
        Question("frame", ["frame", NAMES[tints[f]], f"r{r}", f"c{c}"], [str(digit[f][r][c]), "."])
        for f, r, c in rng.sample(places, count)
    ]


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
    """Put the questions of each sequence behind its visual tokens."""
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


def right_tokens(batch: Batch, logits: Tensor) -> Tensor:
    """`[B, T]` whether the most likely word is the right one; True where nothing is to be answered.

    Args:
        batch: The sequences.
        logits: `[B, T + 1, V]` at the last position before the text and at all of the text.
    """
    return (logits[:, :-1].argmax(-1) == batch.labels) | (batch.labels == IGNORED)


def score(batches: Sequence[Batch], right: Sequence[Tensor]) -> dict[str, float]:
    """Shares of questions answered exactly, by task and group.

    An answer counts when all its words are the most likely ones given the right words before them, which is when
    greedy decoding writes exactly this answer. `T2 cells` is the share of right words in the answers of T2, `T5` what
    the questions behind the first of a sequence about one board reach.

    Args:
        batches: What was asked.
        right: `right_tokens` of each.
    """
    found: dict[str, list[float]] = defaultdict(list)
    groups = {task: group for group, tasks in GROUPS.items() for task in tasks}
    for batch, correct in zip(batches, right, strict=True):
        for questions, turns, oks in zip(batch.questions, batch.turn.tolist(), correct.tolist(), strict=True):
            answers: dict[int, list[bool]] = defaultdict(list)
            for turn, ok in zip(turns, oks, strict=True):
                answers[turn].append(ok)
            for i, question in enumerate(questions):
                exact = float(all(answers[i]))
                found[question.task].append(exact)
                found[groups[question.task]].append(exact)
                if groups[question.task] == "T2":
                    found["T2 cells"] += map(float, answers[i][:-1])
                if i and question.task != "frame":
                    found["T5"].append(exact)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}
