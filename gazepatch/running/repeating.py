"""Whether a step of `generate` has the mask of the step before it, without a look at the numbers in it.

Who sees which image is a mask that a forward gets anew each time, on the device: to compare it with that of the last
step the host would have to wait. But `generate` makes it by repeating the last row of what it had. So that row gets a
name, an object that says nothing but which row it is, when it is repeated for the first time. A mask that comes from
anywhere else has none.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gazepatch.running.runtime import Runtime


class _Last(threading.local):
    """The last mask that a thread's `generate` made, and the one that it handed on, each with the name of its row."""

    def __init__(self) -> None:
        self.made: _Named | None = None
        self.handed: _Named | None = None


class _Named:
    """A mask, as long as somebody else keeps it, with the name of its last row."""

    def __init__(self, mask: Tensor, row: object) -> None:
        self.mask, self.row = weakref.ref(mask), row


class Repeating:
    """Follows the cross-attention mask of one patched model through `generate`."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.name, self._last = runtime, runtime.adapter.cross_mask, _Last()

    def update(self, function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wrap `_update_model_kwargs_for_generation`, which repeats the last row of the mask for a new token."""

        @functools.wraps(function)
        def updated(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            last, before = self._last, model_kwargs.get(self.name)
            changed = function(outputs, model_kwargs, *args, **kwargs)
            if before is not None:
                last.made = _Named(changed[self.name], _row(before, last.made) or object())
            return changed

        return updated

    def prepare(self, function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Wrap `prepare_inputs_for_generation`, which hands on the last rows of the mask."""

        @functools.wraps(function)  # generate() reads the signature
        def prepared(*args: Any, **kwargs: Any) -> dict[str, Any]:
            last, inputs = self._last, function(*args, **kwargs)
            if (row := _row(kwargs.get(self.name), last.made)) is not None:
                last.handed = _Named(inputs[self.name], row)
            return inputs

        return prepared

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the name of the last row of the mask that a forward starts with."""
        if torch.compiler.is_compiling():  # names mean nothing there
            return
        self.runtime.running.last_row = _row(kwargs.get(self.name), self._last.handed)


def _row(mask: Tensor | None, last: _Named | None) -> object | None:
    return last.row if last is not None and mask is not None and mask is last.mask() else None
