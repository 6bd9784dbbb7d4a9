"""Gradient checkpointing: layers that are run again for their gradients, when their forward is long over."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from gazepatch.caches.name import CACHE, FORMER
from gazepatch.errors import UnsupportedModelError

#: The argument by which layers that are run again know the forward that they belong to.
OF_FORWARD = "gaze_forward"


def checkpoints(decoder: nn.Module) -> bool:
    """Whether the layers keep nothing for their gradients, and use no cache."""
    # Before transformers 5.24, which renamed the cache as well, layers did so without gradients too.
    run = torch.is_grad_enabled() or CACHE == FORMER
    # Some decoders say it of their layers alone.
    return run and decoder.training and any(getattr(m, "gradient_checkpointing", False) for m in decoder.modules())


def runs_again(decoder: nn.Module, signature: inspect.Signature) -> bool:
    """Whether layers will be run again, outside of this forward.

    Raises:
        UnsupportedModelError: By its `signature` the decoder passes nothing on to them that could tell them which.
    """
    if not (checkpoints(decoder) and torch.is_grad_enabled()):
        return False
    if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
        raise UnsupportedModelError(
            "this text decoder passes nothing on to its layers, so gradient checkpointing cannot tell them where "
            "they gaze: call model.gradient_checkpointing_disable()"
        )
    return True
