"""Scores and selections of a few regions, with the expected numbers in view, and against plain softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch

from gazepatch.regions import ABSENT
from gazepatch.score_mod import ScoreMod
from gazepatch.selection import region_scores, select, window_logits

pytestmark = pytest.mark.usefixtures("poisoned")

#: id -> scores, regions in the order in which they are selected
ORDERS: dict[str, tuple[list[float], list[int]]] = {
    "one": ([1.0], [0]),
    "distinct": ([0.1, 0.4, 0.2, 0.3], [1, 3, 2, 0]),
    "a tie": ([0.2, 0.3, 0.2, 0.3], [1, 3, 0, 2]),
    "all equal": ([0.25] * 4, [0, 1, 2, 3]),
    "all zero": ([0.0] * 5, [0, 1, 2, 3, 4]),
    "neighbouring floats": ([0.5, math.nextafter(0.5, 1), 0.5 + 2**-24], [2, 0, 1]),
    "subnormal": ([0.0, 1e-45, 3e-45, 1e-38], [3, 2, 1, 0]),
    "forbidden": ([-1.0, 0.0, -1.0, 1e-45, 1.0], [4, 3, 1, 0, 2]),
    "all forbidden": ([-1.0, -1.0, -1.0], [0, 1, 2]),
}


@pytest.mark.parametrize(("scores", "order"), ORDERS.values(), ids=ORDERS)
def test_select(scores: list[float], order: list[int]) -> None:
    for count in range(len(order) + 1):
        assert select(torch.tensor(scores), count).tolist() == order[:count]


@pytest.mark.parametrize("regions", [1, 35, 36, 63, 100, 5000])
def test_select_among_many_ties(regions: int) -> None:
    # Three neighbouring floats: topk by itself returns ties in no order that one could rely on.
    bits = torch.tensor(0.5).view(torch.int32) + torch.randint(3, (2, 3, 4, regions), dtype=torch.int32)
    scores = bits.view(torch.float32)
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    for count in {1, (regions + 1) // 2, regions}:
        assert torch.equal(select(scores, count), expected[..., :count])


def test_window_logits() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 2)
    mean_keys = torch.tensor([[3.0, 5.0], [-1.0, 0.5], [7.0, 7.0]]).view(1, 1, 3, 2)
    logits = window_logits(query, mean_keys, torch.tensor([[0.25, 0.5, ABSENT]]), ScoreMod(0.5))
    assert logits.shape == (1, 1, 2, 3) and logits.dtype == torch.float32
    assert logits[0, 0, :, :2].tolist() == [[1.75, 0.0], [5.25, 1.0]]
    assert (logits[..., 2] < -1e29).all()


def test_window_logits_are_capped_before_counts_are_added() -> None:
    query, mean_keys = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([1.0, -3.0, 0.0]).view(1, 1, 3, 1)
    logits = window_logits(query, mean_keys, torch.tensor([[5.0, 0.5, 0.0]]), ScoreMod(0.5, softcap=2.0))
    assert logits.flatten().tolist() == pytest.approx([2 * math.tanh(0.5) + 5, 2 * math.tanh(-1.5) + 0.5, 0.0])


def test_window_logits_of_rows_with_their_own_counts() -> None:
    query, mean_keys = torch.ones(2, 1, 1, 1), torch.ones(2, 1, 2, 1)
    logits = window_logits(query, mean_keys, torch.tensor([[0.0, 1.0], [2.0, ABSENT]]), ScoreMod(1.0))
    assert logits[:, 0, 0].tolist() == [[1.0, 2.0], [3.0, pytest.approx(ABSENT)]]


#: Softmax of two query heads over two regions of two windows, in sixteenths
WEIGHTS = [[6, 1, 1, 8], [4, 4, 0, 8]]
REDUCED = {"mean": [[7.5, 8.5]], "max": [[8, 9]], "none": [[7, 9], [8, 8]]}


@pytest.mark.parametrize(("head_reduce", "expected"), REDUCED.items(), ids=REDUCED)
def test_region_scores(head_reduce: str, expected: list[list[float]]) -> None:
    weights = torch.tensor(WEIGHTS)[None, None] / 16
    assert (region_scores(weights, 2, head_reduce)[0, 0] * 16).tolist() == expected


@pytest.mark.parametrize("head_reduce", ["mean", "max", "none"])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(("regions", "windows"), [(1, 1), (1, 4), (35, 1), (36, 4), (63, 9), (100, 2)], ids=str)
def test_scores_are_those_of_a_plain_softmax(regions: int, windows: int, group: int, head_reduce: str) -> None:
    batch, key_heads, dim, scale = 2, 3, 16, 0.25
    query, mean_keys = torch.randn(batch, key_heads, group, dim), torch.randn(batch, key_heads, regions * windows, dim)
    counts = torch.randint(1, 10, (batch, regions * windows))
    absent = torch.rand(batch, regions, windows) < 0.3
    absent[..., 0] = False  # every region has a window
    absent = absent.flatten(1)
    log_counts = counts.float().log().masked_fill(absent, ABSENT)

    scores = region_scores(
        window_logits(query, mean_keys, log_counts, ScoreMod(scale)).softmax(-1), windows, head_reduce
    )

    x = scale * query.double() @ mean_keys.double().mT + counts.double().log()[:, None, None]
    x = x.masked_fill(absent[:, None, None], -math.inf).unflatten(-1, (regions, windows)).logsumexp(-1)
    expected = x.softmax(-1)
    if head_reduce != "none":
        expected = expected.mean(2, keepdim=True) if head_reduce == "mean" else expected.amax(2, keepdim=True)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, atol=1e-7, rtol=1e-5)
    count = (regions + 3) // 4
    assert torch.equal(select(scores, count), expected.topk(count).indices)


def test_counts_are_added_in_float32() -> None:
    query, mean_keys = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.full((1, 1, 2, 1), 256, dtype=torch.bfloat16)
    # bfloat16 has 8 bits: both would be 256, and a tie.
    logits = window_logits(query, mean_keys, torch.tensor([[0.25, 0.5]]), ScoreMod(1.0))
    assert logits.tolist() == [[[[256.25, 256.5]]]]
