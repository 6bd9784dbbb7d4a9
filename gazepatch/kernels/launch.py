"""Launches of kernels: the first of its kind, for which Triton finds or compiles the code, and those like it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from gazepatch.kernels.settings import on

Grid = tuple[int, int, int]


class Launch(NamedTuple):
    """One launch of a kernel: which, how many programs, arguments in its order, and constants and settings by name."""

    kernel: Any
    grid: Grid
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    def run(self, device: torch.device) -> Any:
        """Launch it; returns the code that Triton has for such arguments, or None where kernels are interpreted."""
        with on(device):
            return self.kernel[self.grid](*self.arguments, **self.constants)


class CachedLaunch:
    """A launch that was made, to be made again with others in the place of few of its arguments.

    To find the code for a launch, Triton looks at each of some sixty arguments: which type, whether a multiple of 16,
    whether 1. It takes longer than the kernel. Here the code is known, so whoever changes an argument must keep it of
    its kind: a tensor of the same type, and aligned to 16 bytes as the other was, or a number that is not specialised.

    Args:
        code: What `Launch.run` returned.
        launch: The launch.
        changing: Names of the arguments that change.
    """

    def __init__(self, code: Any, launch: Launch, *changing: str) -> None:
        defaults = _parameters(launch.kernel.fn)
        values = dict(zip(defaults, launch.arguments, strict=False))
        values = {**defaults, **values, **launch.constants, **dict.fromkeys(changing)}
        places = {name: place for place, name in enumerate(defaults)}
        self._code, self._places = code, [places[name] for name in changing]
        # In the order of the kernel, constants too, as Triton hands them on.
        self._arguments = [values[name] for name in defaults]

    def run(self, grid: Grid, *changed: Any) -> None:
        """Launch on the current device, with these for the arguments that change, in their order."""
        arguments = self._arguments.copy()
        for place, argument in zip(self._places, changed, strict=True):
            arguments[place] = argument
        self._code[grid](*arguments)


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a kernel, in order, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
