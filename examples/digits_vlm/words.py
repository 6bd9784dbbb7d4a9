"""What there is to say about boards: colours, tasks, and the vocabulary of a board of some size."""

from __future__ import annotations

from dataclasses import dataclass

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
