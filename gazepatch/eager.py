"""What `torch.compile` made, put aside for the length of a block.

torch has one stance for the whole process, whatever thread sets it. Of blocks that overlap the first one changes it,
and the last one puts back what the first one found: each by itself would put back what another one set.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Stance:
    """Blocks that are on, as torch's stance is: one for the process."""

    def __init__(self) -> None:
        self.lock, self.blocks, self.found = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if self.blocks == 0:
                self.found.enter_context(torch.compiler.set_stance("force_eager"))
            self.blocks += 1

    def leave(self) -> None:
        with self.lock:
            self.blocks -= 1
            if self.blocks == 0:
                self.found.close()


_stance = _Stance()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Run everything as it is written, in all threads, until the last of these blocks is left."""
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()
