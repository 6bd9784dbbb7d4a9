"""Steps of a layer by the launches of the steps before them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gazepatch.kernels.launch import CachedLaunch, Launch
from gazepatch.kernels.settings import on, row_stride
from gazepatch.ops.decode import Entries
from gazepatch.ops.pending import PendingEntry
from gazepatch.score_mod import ScoreMod

ALIGNED = 16  # bytes, as Triton asks

Held = tuple[Tensor | None, ...]


class Step(NamedTuple):
    """A routed step of one layer, as `DecodePlan.decode` is asked for it, with its own entry late."""

    query: Tensor
    entries: Entries
    score_mod: ScoreMod
    bias: Tensor | None
    total: Tensor | None
    pending: PendingEntry

    def held(self) -> Held:
        """What lies where it lay in the step before, as long as nothing of the sequence is made anew."""
        return (*self.entries[2:], *self.pending.stores, self.pending.filled, self.total)

    def kinds(self) -> tuple[Any, ...]:
        """All that Triton looks at of the tensors that every step brings, and their shapes."""
        new = (self.query, *self.pending.entry)
        strides, dtypes, places = zip(*[(x.stride(), x.dtype, x.data_ptr() % ALIGNED) for x in new], strict=True)
        bias = None if self.bias is None else (len(self.bias), self.bias.stride(-1), self.bias.data_ptr() % ALIGNED)
        return self.query.shape, strides, dtypes, places, bias


class Repeated:
    """The two launches of a step, for those after it: only what a step brings itself is another each time.

    Args:
        step: The step.
        chosen: Its launch of the selection.
        attended: Its launch of the decode kernel.
        codes: What Triton has for them.
    """

    def __init__(self, step: Step, chosen: Launch, attended: Launch, codes: tuple[Any, Any]) -> None:
        self._held, self._kinds, self._scores = step.held(), step.kinds(), step.score_mod
        new = ("new_key", "new_value")[: len(step.pending.entry)]
        self._select = CachedLaunch(codes[0], chosen, "query", *new, "offset")
        self._attend = CachedLaunch(codes[1], attended, "query", "output", "bias", "stride_bias_batch", "others")
        self._grid, (_, self._selections, self._rows) = chosen.grid, attended.grid
        self._output = (*step.query.shape[:2], step.entries.value.shape[3])

    def fits(self, step: Step) -> bool:
        """Whether a step is like it: on the same memory, with a query and an entry of the same kinds."""
        same = _same(self._held, step.held()) and step.score_mod == self._scores and step.kinds() == self._kinds
        return same and not torch.is_grad_enabled()

    def run(self, step: Step, splits: int) -> Tensor:
        """Attention `[B, H, D_v]` of a step like it, by `splits` programs a selection."""
        output, bias = step.query.new_empty(self._output), step.bias
        row = 0 if bias is None else row_stride(bias)
        with on(output.device):
            self._select.run(self._grid, step.query, *step.pending.entry, step.pending.offset)
            grid = splits, self._selections, self._rows
            self._attend.run(grid, step.query, output, bias, row, step.entries.key.shape[2])
        return output


class Steps:
    """How steps were launched, by the visual keys of their layer, for the steps after them.

    That is noted from the second step on the same memory on: in beam search every step is on other memory.
    """

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}  # of the step before, as long as nothing else is known
        self._launched: dict[int, Repeated] = {}

    def __reduce__(self) -> tuple[type[Steps], tuple[()]]:
        # A copy of a cache has memory of its own, and Triton's code is not to be copied.
        return Steps, ()

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()
        self._launched.clear()

    def like(self, step: Step) -> Repeated | None:
        """A step that this one is like, if there was one."""
        layer = id(step.entries.visual_key)
        known = self._launched.get(layer)
        if known is not None and not known.fits(step):
            del self._launched[layer]  # and with it what memory it holds
            return None
        return known

    def wanted(self, step: Step) -> bool:
        """Whether to note how this step is launched."""
        layer, held = id(step.entries.visual_key), step.held()
        before = self._held.pop(layer, None)
        if before is None or not _same(before, held):
            self._held[layer] = held
            return False
        return _repeatable(step)

    def note(self, step: Step, chosen: Launch, attended: Launch, codes: tuple[Any, Any]) -> None:
        """A step was launched so; `codes` are None where kernels are interpreted."""
        if None not in codes:
            self._launched[id(step.entries.visual_key)] = Repeated(step, chosen, attended, codes)


def _same(held: Held, other: Held) -> bool:
    return all([one is another for one, another in zip(held, other, strict=True)])


def _repeatable(step: Step) -> bool:
    """Whether steps like it can be launched again: nothing else of it is made for this step alone."""
    stores = zip((step.entries.key, step.entries.value), (step.pending.stores * 2)[:2], strict=True)
    in_place = all(x.data_ptr() == store.data_ptr() and x.stride() == store.stride() for x, store in stores)
    dense = all(x.stride(-1) == 1 for x in (step.query, *step.pending.entry))
    plain = step.score_mod.sinks is None and step.score_mod.bias is None
    return in_place and dense and plain and not torch.is_grad_enabled()
