"""Gradient checkpointing: layers that are run again for their gradients, when their forward is long over."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from gazepatch.caches.name import CACHE, FORMER
from gazepatch.errors import UnsupportedModelError
from gazepatch.running.forward import Forward

#: The argument by which layers that are run again know the forward that they belong to.
OF_FORWARD = "gaze_forward"


def checkpoints(decoder: nn.Module) -> bool:
    """Whether the layers keep nothing for their gradients, and use no cache."""
    # Before transformers 5.24, which renamed the cache as well, layers did so without gradients too.
    run = torch.is_grad_enabled() or CACHE == FORMER
    # Some decoders say it of their layers alone.
    return run and decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())


def runs_again(decoder: nn.Module) -> bool:
    """Whether layers will be run again, outside of this forward."""
    return checkpoints(decoder) and torch.is_grad_enabled()


def hand_on(forward: Forward, call: dict[str, Any], signature: inspect.Signature) -> None:
    """Let the layers of a decoder, called with `call`, know which forward they belong to when they are run again.

    Raises:
        UnsupportedModelError: By its `signature` the decoder passes nothing on to them that could tell them.
    """
    if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
        raise _unsupported()
    forward.runs_again, call[OF_FORWARD] = True, forward


def handed_on(module: nn.Module, options: dict[str, Any], running: Forward | None) -> Forward | None:
    """The forward that a call of attention with these `options` belongs to, and take it out of them.

    Raises:
        UnsupportedModelError: The `module` of a layer did not get what that was called with, and will be run again.
    """
    given: Forward | None = options.pop(OF_FORWARD, None)
    if given is None and running is not None and running.runs_again and hasattr(module, "layer_idx"):
        raise _unsupported()
    return given or running


def _unsupported() -> UnsupportedModelError:
    return UnsupportedModelError(
        "this text decoder passes nothing on to its attention, so gradient checkpointing cannot tell it where it "
        "gazes: call model.gradient_checkpointing_disable()"
    )
