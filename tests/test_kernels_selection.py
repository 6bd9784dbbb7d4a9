"""Selection by the kernel: the same decisions as its PyTorch twin."""

from __future__ import annotations

import pytest
import torch
from on_kernels import DEVICE, Selection, assert_runs

from gazepatch.kernels.ops import select
from gazepatch.kernels.plan import appended
from gazepatch.ops.pending import PendingEntry

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("head_reduce", ["mean", "max", "none"])
@pytest.mark.parametrize("regions", [1, 35, 36, 63, 100])
def test_selection_among_ties(regions: int, head_reduce: str) -> None:
    # One window a region and heads that agree: equal scores are equal to the bit here as in the twin.
    case = Selection(regions, windows=1, group=4 if regions > 36 else 1, distinct=2)
    if head_reduce != "none":
        case.query = case.query[:, :: case.group].repeat_interleave(case.group, 1)
    for share in (0.0, 0.3, 1.0):
        budget = [round(share * regions), round(share * (regions // 2))]
        if max(budget):
            runs, taken, total = case.run(budget, head_reduce, splits=3)
            expected = case.expected(budget, head_reduce)
            assert torch.equal(taken.bool(), expected)
            assert_runs(runs, expected, case)
            assert total == int((expected * case.length[:, None, None]).sum())


@pytest.mark.parametrize(("regions", "windows"), [(36, 4), (63, 9), (5, 50)], ids=str)
@pytest.mark.parametrize("group", [1, 7])
def test_selection_by_windows(regions: int, windows: int, group: int) -> None:
    case = Selection(regions, windows, group, distinct=7)
    case.mean_keys += torch.randn_like(case.mean_keys)  # no two scores alike
    case.mean_keys = case.mean_keys.mT.contiguous().mT  # as on CPU
    budget = [regions // 3, 1]
    _, taken, _ = case.run(budget, "mean", splits=2)
    assert torch.equal(taken.bool(), case.expected(budget, "mean"))


def test_a_row_without_budget_selects_nothing() -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    runs, taken, _ = case.run([9, 0], "mean", splits=1)
    assert taken[0].sum() == 9 * 2 and not taken[1].any() and not runs[1].any()


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_scores_that_are_no_numbers_stay_in_bounds(nan: float) -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    case.query[0] = nan
    arguments = case.arguments([9, 4], "mean", 2)
    select(*arguments)
    runs, taken = arguments[8:10]
    assert torch.equal(taken[0].nonzero()[:, -1].view(2, 9), torch.arange(9, device=DEVICE).expand(2, 9))
    assert_runs(runs, taken.bool(), case)


@pytest.mark.parametrize("group", [1, 4])
def test_many_regions(group: int) -> None:
    case = Selection(5000, windows=1, group=group, distinct=2, rows=1)
    case.query = case.query[:, ::group].repeat_interleave(group, 1)
    case.length[:] = 1
    _, taken, _ = case.run([500], "mean", splits=1)
    assert torch.equal(taken.bool(), case.expected([500], "mean"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("splits", [1, 3, 20])
def test_equal_regions_weigh_the_same_in_every_tile(splits: int, windows: int, dtype: torch.dtype) -> None:
    case = Selection(300, windows, group=4, distinct=3, rows=1)
    case.length[:], case.log_counts[:] = windows, 0
    of_region = case.mean_keys.unflatten(2, (300, windows))
    of_region[:, :, 150:] = of_region[:, :, :150]
    of_region[:, :, :5], of_region[:, :, 150:155] = 30, -30  # tiles have very different logits
    case.query, case.mean_keys = case.query.to(dtype), case.mean_keys.to(dtype)
    for budget in (40, 90, 155):
        runs, taken, _ = case.run([budget], "mean", splits)
        assert (taken.sum(-1) == budget).all() and (runs[..., 1] > 0).all()
        assert (taken[..., 5:150] >= taken[..., 155:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("filled", [None, 40])
@pytest.mark.parametrize("dims", [(16, 16), (16, 1), (16, 200), (16,)], ids=str)
def test_an_entry_is_appended_by_the_way(dims: tuple[int, ...], filled: int | None, dtype: torch.dtype) -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    stores = tuple(torch.randn(2, 2, 51, dim, device=DEVICE).to(dtype) for dim in dims)
    # As a projection leaves them, and once with an odd order in memory.
    entry = tuple(torch.randn(2, 1, 2, dim, device=DEVICE).to(dtype).transpose(1, 2) for dim in dims)
    entry = (entry[0].mT.contiguous().mT, *entry[1:])
    count = None if filled is None else torch.tensor(filled, device=DEVICE)
    pending = PendingEntry(stores, entry, count, 7 if filled is None else 7 - filled)
    expected = [store.clone() for store in stores]
    pending._replace(stores=tuple(expected)).write()
    select(*case.arguments([9, 4], "mean", 3, appended(pending)))
    for store, written in zip(stores, expected, strict=True):
        assert torch.equal(store, written)
    assert all(torch.equal(store[:, :, 7:8], new) for store, new in zip(stores, entry, strict=True))


def test_nothing_is_written_after_the_end_of_a_full_store() -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    store, entry = (torch.randn(2, 2, tokens, 16, device=DEVICE) for tokens in (8, 1))
    before = store.clone()
    for filled in (None, torch.tensor(5, device=DEVICE)):
        pending = PendingEntry((store,), (entry,), filled, 8 if filled is None else 3)
        select(*case.arguments([9, 4], "mean", 3, appended(pending)))
    assert torch.equal(store, before)
