"""A step of one layer by the launches of the step before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gazepatch.kernels.launch import Again, Launch
from gazepatch.kernels.launches import on, row_stride
from gazepatch.ops.decode import Entries
from gazepatch.ops.late import Late
from gazepatch.scores import Scores

ALIGNED = 16  # bytes, as Triton asks

Held = tuple[Tensor | None, ...]


class Step(NamedTuple):
    """A routed step of one layer, as `DecodePlan.decode` is asked for it, with its own entry late."""

    query: Tensor
    entries: Entries
    scores: Scores
    bias: Tensor | None
    total: Tensor | None
    late: Late

    def held(self) -> Held:
        """What lies where it lay in the step before, as long as nothing of the sequence is made anew."""
        return (*self.entries[2:], *self.late.stores, self.late.filled, self.total)

    def kinds(self) -> tuple[Any, ...]:
        """All that Triton looks at of the tensors that every step brings, and their shapes."""
        new = (self.query, *self.late.entry)
        strides, dtypes, places = zip(*[(x.stride(), x.dtype, x.data_ptr() % ALIGNED) for x in new], strict=True)
        bias = None if self.bias is None else (len(self.bias), self.bias.stride(-1), self.bias.data_ptr() % ALIGNED)
        return self.query.shape, strides, dtypes, places, bias


class Repeated:
    """The two launches of a step, for those behind it: only what a step brings itself is another each time.

    Args:
        step: The step.
        chosen: Its launch of the selection.
        attended: Its launch of the decode kernel.
        codes: What Triton has for them.
    """

    def __init__(self, step: Step, chosen: Launch, attended: Launch, codes: tuple[Any, Any]) -> None:
        self._held, self._kinds, self._scores = step.held(), step.kinds(), step.scores
        new = ("new_key", "new_value")[: len(step.late.entry)]
        self._select = Again(codes[0], chosen, "query", *new, "offset")
        self._attend = Again(codes[1], attended, "query", "output", "bias", "bias_row", "others")
        self._grid, (_, self._selections, self._rows) = chosen.grid, attended.grid
        self._output = (*step.query.shape[:2], step.entries.value.shape[3])

    def fits(self, step: Step) -> bool:
        """Whether a step is like it: on the same memory, with a query and an entry of the same kinds."""
        for held, of_step in zip(self._held, step.held(), strict=True):
            if held is not of_step:
                return False
        return step.scores == self._scores and step.kinds() == self._kinds and not torch.is_grad_enabled()

    def run(self, step: Step, splits: int) -> Tensor:
        """Attention `[B, H, D_v]` of a step like it, by `splits` programs a selection."""
        output, bias = step.query.new_empty(self._output), step.bias
        row = 0 if bias is None else row_stride(bias)
        with on(output.device):
            self._select.run(self._grid, step.query, *step.late.entry, step.late.offset)
            grid = splits, self._selections, self._rows
            self._attend.run(grid, step.query, output, bias, row, step.entries.key.shape[2])
        return output


def repeatable(step: Step) -> bool:
    """Whether steps like it can be launched again: nothing else of it is made for this step alone."""
    stores = zip((step.entries.key, step.entries.value), (step.late.stores * 2)[:2], strict=True)
    in_place = all(x.data_ptr() == store.data_ptr() and x.stride() == store.stride() for x, store in stores)
    dense = all(x.stride(-1) == 1 for x in (step.query, *step.late.entry))
    plain = step.scores.sinks is None and step.scores.bias is None
    return in_place and dense and plain and not torch.is_grad_enabled()
