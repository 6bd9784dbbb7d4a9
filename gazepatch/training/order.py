"""The order in which a training reads its records: the same, however many processes share an update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class Shuffled(Sampler[int]):
    """Numbers of records, one pass over all of them after the other, each in an order of its own.

    Passes are not apart: an update takes as many records at the end of one as anywhere else, some of them of the next.
    A loader would otherwise fill it up for several processes, and leave it short for one.

    Args:
        records: How many there are.
        total: How many numbers to give.
        seed: Of the orders.
    """

    def __init__(self, records: int, total: int, seed: int) -> None:
        self.records, self.total, self.seed = records, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for done in range(0, self.total, self.records):
            yield from torch.randperm(self.records, generator=generator)[: self.total - done].tolist()
