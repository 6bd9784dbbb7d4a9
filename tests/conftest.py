"""Seeds, poisoned memory, and random sequences with images in them, as a model would hand them to attention."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.layout import Block, Span
from gazepatch.reference import gaze_reference
from gazepatch.score_mod import ScoreMod
from gazepatch.tiling import tile_span

# The tests are many small operations, which further threads only slow down.
torch.set_num_threads(1)

# On a GPU, convolutions in float32 are rounded to ten bits otherwise, and vision towers begin with them.
torch.backends.cudnn.allow_tf32 = False

# Where there is no GPU, the tests of the kernels run them in Triton's interpreter. Triton asks when it is imported, and
# more modules import it than one would think, so this comes before all of them. Other tests do not notice: on CPU,
# backend="auto" is plain PyTorch all the same.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten memory holds NaN, or a number that is no index, so that whoever reads it shows in the output."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            memory = make(*args, **kwargs)
            with torch.no_grad():
                return memory.fill_(float("nan") if memory.is_floating_point() else torch.iinfo(memory.dtype).min)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.fixture
def fresh() -> Iterator[None]:
    """Without anything that was compiled before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class Sequences:
    """Rows of random tokens: what one layer would get for them.

    Attributes:
        spans: Visual tokens of all rows.
        starts, stops: Half-open ranges of the prompt and of every later turn.
        steps: Tokens to decode after each of them.
        query: `[B, H, L, D]`, one for every position.
        key: `[B, H_kv, L, D]`.
        value: `[B, H_kv, L, D_v]`.
        visible: `[B, L]` False for padding.
        softcap: Bound of the scores.
        sinks: `[B or 1, H, L or 1]` scores of a key without a value.
        bias: `[B or 1, H, L, L]` added to the scores of every query and key.
    """

    spans: list[Span]
    starts: list[int]
    stops: list[int]
    steps: int
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scale: float = 0.25
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.query)

    def to(self, dtype: torch.dtype) -> Sequences:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def score_mod(self, positions: Tensor | slice, keys: int) -> ScoreMod:
        """What becomes of the dot products of the queries at these positions and so many keys."""
        bias = None if self.bias is None else self.bias[..., :keys]
        return ScoreMod(self.scale, self.softcap, self.sinks, bias).of_queries(positions)

    def mask(self, position: int) -> Tensor | None:
        """`[B, 1, 1, L]` for the query at `position`; None without padding, as transformers has it."""
        return None if self.visible.all() else self.visible[:, None, None, : position + 1]

    def seen(self, row: int, position: int) -> list[Span]:
        """Spans that a query of this row sees whole."""
        return [span for span in self.spans if span.row == row and span.stop <= position]

    def reference(self, position: int, config: GazeConfig) -> tuple[Tensor, Tensor]:
        """Output `[B, H, D_v]` of the queries at `position`, and `[B, H, L]` what they read, by definition."""
        upto = slice(position + 1)
        attended = [
            gaze_reference(
                self.query[row, :, position],
                self.key[row, :, upto],
                self.value[row, :, upto],
                self.seen(row, position),
                config,
                self.scale,
                self.visible[row, upto],
                math.inf if self.softcap is None else self.softcap,
                self.sinks_of(row, position),
                None if self.bias is None else self.bias[row % len(self.bias), :, position, upto],
            )
            for row in range(self.rows)
        ]
        return torch.stack([a.output for a in attended]), torch.stack([a.kept for a in attended])

    def sinks_of(self, row: int, position: int) -> Tensor | None:
        """`[H]` of one query."""
        if self.sinks is None:
            return None
        heads = self.query.shape[1]
        return self.sinks.expand(self.rows, heads, self.query.shape[2])[row, :, position]

    def read(self, kept: Tensor, config: GazeConfig) -> int:
        """Visual entries among the `kept` ones: query heads that share a selection read them once."""
        share = 1 if config.head_reduce == "none" else self.query.shape[1] // self.key.shape[1]
        position = kept.shape[-1] - 1
        return sum(
            int(kept[row, ::share, span.positions()].sum())
            for row in range(self.rows)
            for span in self.seen(row, position)
        )

    def twin(self, position: int, config: GazeConfig, kept: Tensor) -> Tensor:
        """`[B, H, D_v]` in the tensors' own precision: torch's attention over the kept entries and pseudo-tokens."""
        group = self.query.shape[1] // self.key.shape[1]
        outputs = []
        for row, head in torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.query.shape[1])).tolist():
            key, value = self.key[row, head // group], self.value[row, head // group]
            held = kept[row, head]
            keys, values = [key[: position + 1][held]], [value[: position + 1][held]]
            counts = [1] * len(keys[0])
            windows = (
                [w for span in self.seen(row, position) for w in _windows(span, config)] if config.periphery else []
            )
            for window in windows:
                if not held[window].any():
                    keys.append(key[window].mean(0, keepdim=True))
                    values.append(value[window].mean(0, keepdim=True))
                    counts.append(len(window))
            bias = torch.tensor(counts).log().to(key.dtype)[None]
            query = self.query[row, head, position][None]
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[None], torch.cat(keys)[None], torch.cat(values)[None], attn_mask=bias[None], scale=self.scale
                )[0, 0]
            )
        return torch.stack(outputs).view(self.rows, -1, self.value.shape[-1])


def _windows(span: Span, config: GazeConfig) -> list[Tensor]:
    tiling = tile_span(span, config)
    in_order = torch.tensor(span.positions())[tiling.order]
    return [in_order[tiling.slot_windows == number] for number in tiling.slot_windows.unique()]


Part = int | tuple[int, ...]


@pytest.fixture
def sequences() -> Callable[..., Sequences]:
    """Makes `Sequences` from a sketch: a list of turns, a turn being a list of rows, a row a list of parts.

    A part is a number of text tokens, or an image: `(t, h, w)`, `(t, h, w, row_gap)`, or `(n,)` tokens without a grid.
    Shorter rows are padded at the front; after each turn `steps` tokens are decoded.
    """

    def make(
        turns: Sequence[Sequence[Sequence[Part]]],
        steps: int = 1,
        key_heads: int = 2,
        group: int = 4,
        dim: int = 16,
        value_dim: int | None = None,
    ) -> Sequences:
        rows = len(turns[0])
        spans: list[Span] = []
        hidden: list[tuple[int, int, int]] = []
        starts, stops, length = [], [], 0
        for turn in turns:
            laid = [_lay(parts, row) for row, parts in enumerate(turn)]
            longest = max(tokens for _, tokens in laid)
            for row, (of_row, tokens) in enumerate(laid):
                first = length + longest - tokens
                hidden.append((row, length, first))
                spans += [replace(span, start=span.start + first, stop=span.stop + first) for span in of_row]
            starts.append(length)
            stops.append(length + longest)
            length += longest + steps
        visible = torch.ones(rows, length, dtype=torch.bool)
        for row, start, stop in hidden:
            visible[row, start:stop] = False
        query = torch.randn(rows, key_heads * group, length, dim)
        key, value = (torch.randn(rows, key_heads, length, d) for d in (dim, value_dim or dim))
        return Sequences(spans, starts, stops, steps, query, key, value, visible)

    return make


def _lay(parts: Sequence[Part], row: int) -> tuple[list[Span], int]:
    spans: list[Span] = []
    position = 0
    for part in parts:
        if isinstance(part, int):
            position += part
            continue
        if len(part) == 1:
            span = Span(row, position, position + part[0], None, len(spans))
        else:
            span = Block(part[:3], row_gap=part[3] if len(part) > 3 else 0).span(position, row, len(spans))
        spans.append(span)
        position = span.stop
    return spans, position
