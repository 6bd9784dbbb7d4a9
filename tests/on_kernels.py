"""What the tests of the kernels share: where they run, and what they are called with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import BASE
from torch import Tensor

from gazepatch.regions import ABSENT
from gazepatch.score_mod import ScoreMod
from gazepatch.selection import region_scores, window_logits
from gazepatch.selection import select as torch_select

pytest.importorskip("triton")
from gazepatch.kernels.ops import select
from gazepatch.kernels.settings import most_tiles, padded_regions

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = replace(BASE, backend="triton")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def on_device(sequence: Any) -> Any:
    return replace(
        sequence,
        **{name: getattr(sequence, name).to(DEVICE) for name in ("query", "key", "value", "visible")},
        **{name: x.to(DEVICE) for name in ("sinks", "bias") if (x := getattr(sequence, name)) is not None},
    )


class Selection:
    """Random windows for `select`, and its outputs."""

    def __init__(self, regions: int, windows: int, group: int, distinct: int, rows: int = 2) -> None:
        key_heads, dim, total = 2, 16, regions * windows
        # Small integers have exact products, and few of them many ties.
        self.query = torch.randint(-1, 2, (rows, key_heads * group, dim), device=DEVICE).float()
        self.mean_keys = torch.randint(0, distinct, (rows, key_heads, total, dim), device=DEVICE).float()
        counts = torch.randint(1, 3, (rows, regions, windows), device=DEVICE)
        self.length = counts.sum(-1).int()
        self.length[-1, regions // 2 :] = 0  # regions that only the first row has
        present = (self.length > 0)[..., None].expand_as(counts)
        self.log_counts = counts.float().log().masked_fill(~present, ABSENT).flatten(1)
        self.start = (self.length.cumsum(-1) - self.length).int()
        self.group, self.windows, self.regions = group, windows, regions
        self.shape = (rows, key_heads)

    def arguments(
        self, budget: list[int], head_reduce: str, splits: int, appended: tuple[Any, ...] = (*[None] * 5, 0)
    ) -> tuple[Any, ...]:
        """Of `select`."""
        selections = self.group if head_reduce == "none" else 1
        rows, key_heads = self.shape
        heads, whole = key_heads * self.group, {"dtype": torch.int32, "device": DEVICE}
        return (
            *(self.query, self.mean_keys, self.log_counts, torch.stack([self.start, self.length], -1)),
            torch.tensor(budget, **whole),
            torch.empty(rows, heads, self.regions * self.windows, device=DEVICE),
            torch.empty(rows, heads, padded_regions(self.regions), device=DEVICE),
            torch.empty(rows, heads, most_tiles(self.regions, self.windows), 2, device=DEVICE),
            torch.empty(rows, key_heads, selections, max(budget), 2, **whole),
            torch.empty(rows, key_heads, selections, self.regions, dtype=torch.int8, device=DEVICE),
            torch.tensor([5], device=DEVICE),
            torch.zeros(rows * key_heads, **whole),
            *appended,
            *(0.25, None, head_reduce == "max", True, splits),
        )

    def run(self, budget: list[int], head_reduce: str, splits: int) -> tuple[Tensor, Tensor, int]:
        """Runs, taken regions and tokens that were counted."""
        arguments = self.arguments(budget, head_reduce, splits)
        select(*arguments)
        logits, _, _, runs, taken, total, arrived = arguments[5:12]
        assert not arrived.any()
        torch.testing.assert_close(logits, self.logits().flatten(1, 2), atol=1e-5, rtol=0)
        return runs, taken, int(total) - 5

    def logits(self) -> Tensor:
        grouped = self.query.unflatten(1, (-1, self.group))
        return window_logits(grouped, self.mean_keys, self.log_counts, ScoreMod(0.25))

    def expected(self, budget: list[int], head_reduce: str) -> Tensor:
        """Which regions the twin takes."""
        scores = region_scores(self.logits().softmax(-1), self.windows, head_reduce)
        scores = scores.masked_fill((self.length == 0)[:, None, None], -1.0)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        for row, count in enumerate(budget):
            taken[row].scatter_(-1, torch_select(scores[row], count), True)
        return taken


def assert_runs(runs: Tensor, taken: Tensor, case: Selection) -> None:
    for row, head, group in torch.cartesian_prod(*map(torch.arange, taken.shape[:3])).view(-1, 3).tolist():
        numbers = taken[row, head, group].nonzero()[:, 0]
        held = torch.stack([case.start[row, numbers], case.length[row, numbers]], -1)
        unused = held.new_zeros(runs.shape[3] - len(numbers), 2)
        assert torch.equal(runs[row, head, group], torch.cat([held, unused]))


def decode_arguments(splits: int, longest: int = 16) -> tuple[Any, ...]:
    query, key = torch.randn(1, 4, 16, device=DEVICE), torch.randn(1, 2, 5, 16, device=DEVICE)
    store = torch.randn(1, 2, 80, 16, device=DEVICE)
    runs = (
        torch.tensor([[0, 9], [20, 0], [64, 16]], dtype=torch.int32, device=DEVICE).expand(1, 2, 1, 3, 2).contiguous()
    )
    scratch = torch.empty(2, splits, 2, 16, device=DEVICE), torch.empty(2, splits, 2, 2, device=DEVICE)
    arrived = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    return (
        query,
        key,
        key,
        None,
        store,
        store,
        runs,
        None,
        None,
        None,
        None,
        *scratch,
        arrived,
        0.25,
        None,
        longest,
        splits,
    )
