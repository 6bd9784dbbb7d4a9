"""What decode steps read, region by region: kept on the device while it happens, in plain numbers when asked for."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.errors import GazeError
from gazepatch.layout import Grid, Span
from gazepatch.tiling import region_cells

#: Numbers of the regions that each selection of one row read, ascending; None: all there are. A selection is a key
#: head's or, where every query head selects for itself, a query head's.
Read = list[list[int]] | None
#: By layer and row, what one decode step read.
Step = dict[int, list[Read]]


class Region(NamedTuple):
    """One region of a row: the cells from `start` to before `stop`, `(t, h, w)`, of span number `span` of the trace.

    In a span without a grid the cells are its tokens, in a single row.
    """

    number: int
    span: int
    start: Grid
    stop: Grid

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        t, h, w = (stop - start for start, stop in zip(self.start, self.stop, strict=True))
        return t * h * w


class Trace:
    """What the decode steps since the last prompt read. Step i comes from the token i of the answer and makes the next.

    Rows are those of the batch; with beam search they are beams, in the order that they had at that step.

    Attributes:
        settings: In force for this sequence; None before the first forward.
        spans: Visual tokens of the sequence, by position.
        regions: For every row, its regions by number.
    """

    def __init__(self) -> None:
        self.settings: GazeConfig | None = None
        self.spans: list[Span] = []
        self.regions: list[list[Region]] = []
        self._tokens: list[dict[int, int]] = []  # of every row, by region
        self._sequence: weakref.ref[GazeState] | None = None
        self._reads: list[Mapping[int, Tensor | None]] = []
        self._steps: list[Step] = []

    @property
    def steps(self) -> list[Step]:
        """The decode steps so far. Moves what is still on the device to the host, which waits for it."""
        reads, self._reads = self._reads, []
        self._steps += [{layer: self._rows(read) for layer, read in sorted(of_step.items())} for of_step in reads]
        return self._steps

    def read_share(self, step: int, row: int = 0, layer: int | None = None) -> float:
        """Share of the visual entries of a row that a step read, in one layer or in all; 0 when there were none.

        Raises:
            GazeError: There is no such step, row or layer.
        """
        if not -len(self.steps) <= step < len(self.steps):
            raise GazeError(f"expected a step below {len(self.steps)}, those that were traced, got {step}")
        if layer is not None and layer not in self.steps[step]:
            raise GazeError(f"expected a layer that gazes, {', '.join(map(str, self.steps[step]))}, got {layer}")
        self._of_row(row)
        layers = self.steps[step] if layer is None else [layer]
        shares = [self._share(self.steps[step][i][row], row) for i in layers]
        return sum(shares) / len(shares)

    def to_dict(self, row: int = 0) -> dict[str, Any]:
        """One row in what JSON can hold: `spans`, `regions` (their `span` counts these) and `steps`.

        A step holds its `read_share` and, under `layers`, the region numbers of every selection, or null for all.
        """
        places = [i for i, span in enumerate(self.spans) if span.row == row]
        return {
            "settings": None if self.settings is None else self.settings.to_dict(),
            "spans": [_span(self.spans[i]) for i in places],
            "regions": [
                {"number": r.number, "span": places.index(r.span), "start": list(r.start), "stop": list(r.stop)}
                for r in self._of_row(row)
            ],
            "steps": [
                {
                    "read_share": self.read_share(i, row),
                    "layers": {str(layer): rows[row] for layer, rows in step.items()},
                }
                for i, step in enumerate(self.steps)
            ],
        }

    # ---- written by the running model

    def follow(self, state: GazeState, rows: int, prompt: bool) -> None:
        """A forward starts: with a prompt, or with another sequence than before, the trace starts again."""
        if prompt or self._sequence is None or self._sequence() is not state:
            self._sequence = weakref.ref(state)
            self._reads, self._steps = [], []
            self.settings = state.config
            self.spans, self.regions = _by_position(state), _regions(state, rows)
            self._tokens = [{region.number: region.tokens for region in of_row} for of_row in self.regions]
        elif rows != len(self.regions):
            raise GazeError(
                f"a trace keeps rows apart: expected the {len(self.regions)} rows of the prompt in every step, got "
                f"{rows}: start the trace when the batch has its rows"
            )

    def add(self, reads: Mapping[int, Tensor | None]) -> None:
        """A decode step is over: by layer, `[B, H_kv, g, S]` numbers of the regions read, -1 for none, or None."""
        self._reads.append(reads)

    # ---- from tensors to numbers

    def _rows(self, read: Tensor | None) -> list[Read]:
        if read is None:
            return [None] * len(self.regions)
        listed: list[list[list[int]]] = read.flatten(1, 2).tolist()
        return [_read(selections, len(of_row)) for selections, of_row in zip(listed, self.regions, strict=True)]

    def _share(self, read: Read, row: int) -> float:
        tokens = self._tokens[row]
        if read is None:
            return 1.0 if tokens else 0.0
        return sum(tokens[number] for selection in read for number in selection) / (len(read) * sum(tokens.values()))

    def _of_row(self, row: int) -> list[Region]:
        if not 0 <= row < max(1, len(self.regions)):
            raise GazeError(f"expected a row below {len(self.regions)}, the rows that were traced, got {row}")
        return self.regions[row] if self.regions else []


def _read(selections: Sequence[Sequence[int]], regions: int) -> Read:
    numbers = [sorted(number for number in selection if number >= 0) for selection in selections]
    return None if all(len(selection) == regions for selection in numbers) else numbers


def _span(span: Span) -> dict[str, Any]:
    grid = None if span.grid is None else list(span.grid)
    return {
        "media": span.media,
        "tile": span.tile,
        "frame": span.frame,
        "grid": grid,
        "start": span.start,
        "stop": span.stop,
    }


def _by_position(state: GazeState) -> list[Span]:
    """The spans of a sequence without the context tokens among them."""
    position, _ = state.slots.upto(state.length + state.new_tokens)
    moved = []
    for span in state.seen_spans():
        start, last = position[span.row % len(position), [span.start, span.stop - 1]].tolist()
        moved.append(replace(span, start=start, stop=last + 1, frame_gap=0))
    return moved


def _regions(state: GazeState, rows: int) -> list[list[Region]]:
    """The regions of every row. Those of later turns can have gaps before them: other rows had more until then."""
    number_of = None if state.regions is None else state.region_of()
    found: list[list[Region]] = [[] for _ in range(rows)]
    for i, span in enumerate(state.seen_spans()):
        first = len(found[span.row])
        if number_of is not None:
            first = int(number_of[span.row % len(number_of), span.start])
        cells = enumerate(region_cells(span, state.config), first)
        found[span.row] += [Region(number, i, start, stop) for number, (start, stop) in cells]
    return found
