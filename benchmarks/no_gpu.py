"""A driver that Triton takes for that of a GPU, and that launches nothing: all that the host does is real."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gazepatch.backend


class NoGpu:
    """Stands for an H100 or H200.

    Attributes:
        launched: What its launches were called with.
        keeps: Whether it notes them there.
    """

    def __init__(self, keeps: bool = False) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.keeps = keeps
        self.utils = self

    def launcher_cls(self, source: object, metadata: object) -> Any:
        """What launches the code of a kernel."""
        return lambda *args: self.launched.append(args) if self.keeps else None

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills and most threads."""
        return 0, 0, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What a kernel is checked against."""
        return {"max_shared_mem": 227 << 10, "max_num_regs": 1 << 16, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def without_gpu(keeps: bool = False) -> NoGpu:
    """From here on kernels are compiled, and launched on nothing, for tensors on the CPU too: to the process's end."""
    found = NoGpu(keeps)
    driver.set_active(found)
    gazepatch.backend._interpreted = lambda: True  # tensors on the CPU will do
    return found
