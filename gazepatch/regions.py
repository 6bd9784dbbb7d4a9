"""The regions of a batch: where each is stored, and what is scored and read together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gazepatch.config import GazeConfig

#: Logit of what takes no part. Finite, so that a part without any entry has weight 0 and not NaN.
ABSENT = -1e30


@dataclass(frozen=True)
class Regions:
    """The regions of a batch, as tables that every gazing layer shares. `b` is 1 where all rows are alike, else B.

    Attributes:
        start: `[b, R]` first slot of the region in its row's visual store.
        length: `[b, R]` its tokens; 0 for a region that only other rows have.
        log_counts: `[b, R * C]` log of the tokens of a window; `ABSENT` for a window that is not there.
        stop: `[b, R]` first position after the span that the region belongs to.
        counts: Regions of each row.
        tokens: Visual tokens of each row.
        max_length: The longest region.
        slots: Entries per row of the visual store, with the padding of rows that have fewer tokens.
    """

    start: Tensor
    length: Tensor
    log_counts: Tensor
    stop: Tensor
    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    max_length: int
    slots: int

    @property
    def even(self) -> bool:
        """Every region of every row has the same number of tokens, so nothing that is read is padding."""
        return self.slots == self.start.shape[1] * self.max_length == min(self.tokens)

    @property
    def windows(self) -> int:
        """C: windows per region."""
        return self.log_counts.shape[1] // self.start.shape[1]

    def budgets(self, config: GazeConfig) -> list[int]:
        """Regions that a query of each row reads: all of them where a row has few visual tokens."""
        return [
            count if tokens < config.min_visual_tokens else config.budget_regions(count)
            for count, tokens in zip(self.counts, self.tokens, strict=True)
        ]

    def to(self, device: torch.device) -> Regions:
        """The same tables on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TABLES})

    def select_rows(self, rows: Tensor) -> Regions:
        """The tables for other rows of the batch, for beam search."""
        if len(self.counts) == 1:
            return self
        picked = rows.tolist()
        return replace(
            self,
            counts=tuple(self.counts[i] for i in picked),
            tokens=tuple(self.tokens[i] for i in picked),
            **{name: getattr(self, name)[rows.to(self.start.device)] for name in _TABLES},
        )

    def only(self, shown: Tensor) -> Regions:
        """The tables for rows that see only the regions `shown` `[b, R]`: others take no part, but keep their slots."""
        rows = self._expand(len(shown))
        length = rows.length * shown
        hidden = ~shown.repeat_interleave(self.windows, 1)
        return replace(
            rows,
            length=length,
            log_counts=rows.log_counts.masked_fill(hidden, ABSENT),
            counts=tuple(shown.sum(1).tolist()),
            tokens=tuple(length.sum(1).tolist()),
        )

    def followed_by(self, other: Regions) -> Regions:
        """These regions, then those of a later turn, whose slots come after."""
        rows = max(len(self.counts), len(other.counts))
        first, second = self._expand(rows), replace(other, start=other.start + self.slots)._expand(rows)
        return Regions(
            **{name: torch.cat([getattr(first, name), getattr(second, name)], 1) for name in _TABLES},
            counts=tuple(a + b for a, b in zip(first.counts, second.counts, strict=True)),
            tokens=tuple(a + b for a, b in zip(first.tokens, second.tokens, strict=True)),
            max_length=max(first.max_length, second.max_length),
            slots=first.slots + second.slots,
        )

    def _expand(self, rows: int) -> Regions:
        if len(self.counts) == rows:
            return self
        return replace(
            self,
            counts=self.counts * rows,
            tokens=self.tokens * rows,
            **{name: getattr(self, name).expand(rows, -1) for name in _TABLES},
        )


_TABLES = ("start", "length", "log_counts", "stop")


def by_window(bias: Tensor, window_of: Tensor, windows: int) -> Tensor:
    """Log-sum-exp of the biases of every window's tokens.

    Args:
        bias: `[B or 1, H, Q, L]` float32.
        window_of: `[B or 1, L]` window of every position, `windows` where there is none.
        windows: R * C.

    Returns:
        `[B, H, Q, R * C]`; about `ABSENT` for windows without tokens.
    """
    rows = max(len(bias), len(window_of))
    bias = bias.expand(rows, -1, -1, -1)
    index = window_of[:, None, None].expand_as(bias)
    shape = (*bias.shape[:3], windows + 1)
    top = bias.new_full(shape, ABSENT).scatter_reduce(-1, index, bias.detach(), "amax")
    total = bias.new_zeros(shape).scatter_add(-1, index, (bias - top.gather(-1, index)).exp())
    return (top + total.clamp(min=torch.finfo(torch.float32).tiny).log())[..., :-1]
