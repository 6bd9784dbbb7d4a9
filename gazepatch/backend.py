"""What computes the routed steps: the kernels on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from typing import NamedTuple

import torch

from gazepatch.errors import ConfigError


class Backend(NamedTuple):
    """`torch` or `triton`, and why."""

    name: str
    reason: str


def choose(setting: str, device: torch.device | None) -> Backend:
    """The backend of tensors on `device`, by the setting `GazeConfig.backend`.

    Args:
        setting: `auto`, `torch` or `triton`.
        device: None where it is not known yet.

    Raises:
        ConfigError: `triton` is asked for where it cannot run.
    """
    if setting == "torch":
        return Backend("torch", "plain PyTorch, as set")
    installed = importlib.util.find_spec("triton") is not None
    if setting == "triton":
        _check_forced(installed, device)
        return Backend("triton", "kernels, as set" + (", interpreted on CPU" if _interpreted() else ""))
    if device is None:
        return Backend("auto", "kernels on a GPU, plain PyTorch elsewhere")
    if device.type != "cuda":
        return Backend("torch", f"plain PyTorch, as the model is on {device.type}")
    if not installed:
        return Backend("torch", "plain PyTorch, as triton is not installed")
    return Backend("triton", f"kernels, as the model is on {'ROCm' if torch.version.hip else 'CUDA'}")


def _check_forced(installed: bool, device: torch.device | None) -> None:
    if not installed:
        raise ConfigError("backend='triton' needs the package triton, which is not installed: pip install triton")
    if _interpreted() or device is None or device.type == "cuda":
        return
    raise ConfigError(
        f"backend='triton' needs a model on a GPU, got one on {device.type}: move it there, take backend='auto', or "
        "set TRITON_INTERPRET=1 before Python starts to run the kernels slowly on CPU"
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


#: What the kernels take.
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
MAX_DIM = 256


def kernels_fit(dtypes: Collection[torch.dtype], *dims: int) -> bool:
    """Whether the kernels take tensors of these types, which must all be one, and heads of these dims."""
    return len(set(dtypes)) == 1 and set(dtypes) <= DTYPES and max(dims) <= MAX_DIM
