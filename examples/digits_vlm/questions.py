"""Questions about boards, with their answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from scenes import Scene
from words import NAMES


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
