"""Methods that `torch.compile` leaves as they are.

What prompts, and steps on caches that grow, do on the host follows from numbers that are others in every call: tracing
it takes long, and finds half-way that it cannot. Steps on static caches do nothing of that kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


def uncompiled(method: Method) -> Method:
    """The method, at which a compiler breaks its graph; without one it costs a look at a flag."""
    opaque = torch.compiler.disable(method)

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (opaque if torch.compiler.is_compiling() else method)(*args, **kwargs)

    return cast(Method, called)
