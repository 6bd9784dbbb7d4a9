"""Attention in parts, put together again, equals attention over everything; a part without weight takes no part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gazepatch.ops.partial import Part, attend, combine, sink
from gazepatch.regions import ABSENT
from gazepatch.score_mod import ScoreMod

pytestmark = pytest.mark.usefixtures("poisoned")

SCALE = 0.3
SCORE_MOD = ScoreMod(SCALE)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: How the torch operator and the fallback are reached: value dimension, whether a gradient is asked for
PATHS = {"operator": (16, False), "other value dimension": (24, False), "gradient": (16, True)}


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    scores = SCALE * query.double() @ key.double().mT
    scores = scores if bias is None else scores + bias.double()
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


def tensors(
    keys: int, path: tuple[int, bool] = (16, False), dtype: torch.dtype = torch.float32, queries: int = 3
) -> list[Tensor]:
    value_dim, gradient = path
    made = [torch.randn(2, 2, n, d).to(dtype) for n, d in ((queries, 16), (keys, 16), (keys, value_dim))]
    return [x.requires_grad_(gradient) for x in made]


def assert_no_worse(actual: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> None:
    """At most thrice the error of whole attention in the same precision, itself a matter of luck, and an ulp."""
    exact, _ = plain(query, key, value, bias)
    if value.shape[-1] != query.shape[-1] or value.requires_grad:  # the fallback rounds scores, as eager attention does
        low = ((query @ key.mT).float() * SCALE + bias).softmax(-1).to(value.dtype) @ value
    else:
        low = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), scale=SCALE)
    error, usual = ((x.double() - exact).abs().max().item() for x in (actual, low))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= 3 * usual + rounding, f"error {error:.2e}, whole attention has {usual:.2e}"


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("keys", [1, 35, 36, 63, 100])
def test_attend(keys: int, queries: int, path: tuple[int, bool]) -> None:
    query, key, value = tensors(keys, path, queries=queries)
    part = attend(query, key, value, SCORE_MOD)
    output, lse = plain(query, key, value)
    assert part.lse.shape == (2, 2, queries) and part.lse.dtype == torch.float32
    torch.testing.assert_close(part.output.double(), output, atol=2e-6, rtol=0)
    torch.testing.assert_close(part.lse.double(), lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_attend_whatever_the_strides(which: int) -> None:
    given = tensors(35)
    expected = attend(*given, SCORE_MOD)
    given[which] = given[which].mT.contiguous().mT
    for actual, wanted in zip(attend(*given, SCORE_MOD), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 35), (2, 1, 1, 35), (2, 2, 1, 35), (2, 2, 3, 35)], ids=str)
def test_attend_with_a_bias_that_broadcasts(shape: tuple[int, ...], path: tuple[int, bool]) -> None:
    query, key, value = tensors(35, path)
    bias = torch.randn(shape).masked_fill(torch.rand(shape) < 0.5, ABSENT)
    part = attend(query, key, value, SCORE_MOD, bias)
    output, lse = plain(query, key, value, bias)
    torch.testing.assert_close(part.output.double(), output, atol=2e-6, rtol=0)
    torch.testing.assert_close(part.lse.double(), lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("keys", [1, 35, 63])
def test_soft_capped_scores(keys: int, path: tuple[int, bool]) -> None:
    query, key, value = tensors(keys, path)
    bias = torch.randn(2, 1, 3, keys)
    part = attend(query, key, value, ScoreMod(SCALE, softcap=0.8), bias)
    scores = 0.8 * (SCALE * query.double() @ key.double().mT / 0.8).tanh() + bias
    torch.testing.assert_close(part.output.double(), scores.softmax(-1) @ value.double(), atol=2e-6, rtol=0)
    torch.testing.assert_close(part.lse.double(), scores.logsumexp(-1), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 6, 1), (2, 6, 1), (1, 6, 5), (2, 6, 5)], ids=str)
def test_a_sink_is_a_key_whose_value_is_zero(shape: tuple[int, ...]) -> None:
    # 2 key heads of 3 query heads each, 5 queries.
    sinks = (2 * torch.randn(shape)).requires_grad_()
    query, key, value = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 35, 16), torch.randn(2, 2, 35, 24)
    grouped = query.view(2, 2, 3, 5, 16).transpose(2, 3).flatten(2, 3)
    parts = [attend(grouped, key[:, :, i], value[:, :, i], SCORE_MOD) for i in random_parts(35)]
    output = (
        combine([*parts, sink(ScoreMod(SCALE, sinks=sinks).grouped(2, 5).sinks)])
        .unflatten(2, (5, 3))
        .transpose(2, 3)
        .flatten(1, 2)
    )
    scores = SCALE * query @ key.repeat_interleave(3, 1).mT
    shares = torch.cat([scores, sinks[..., None].expand(2, 6, 5, 1)], -1).softmax(-1)[..., :-1]
    expected = shares @ value.repeat_interleave(3, 1)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
    gradients = [torch.autograd.grad((x * x).sum(), sinks)[0] for x in (output, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def random_parts(keys: int) -> list[Tensor]:
    """Every key in one of up to four sets, none of them empty."""
    number = torch.randint(4, (keys,))
    return [(number == i).nonzero()[:, 0] for i in number.unique().tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("keys", [1, 35, 36, 63, 100])
def test_combined_parts_are_the_whole(keys: int, path: tuple[int, bool], dtype: torch.dtype) -> None:
    query, key, value = tensors(keys, path, dtype)
    bias = torch.randn(1, 1, 1, keys)
    for _ in range(3):
        parts = [attend(query, key[:, :, i], value[:, :, i], SCORE_MOD, bias[..., i]) for i in random_parts(keys)]
        output = combine(parts)
        assert output.dtype == dtype
        assert_no_worse(output, query, key, value, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("hidden", [[0], [1], [2], [0, 1], [1, 2], [0, 2]], ids=str)
def test_a_hidden_part_has_no_weight(hidden: list[int], path: tuple[int, bool], dtype: torch.dtype) -> None:
    query, key, value = tensors(35, path, dtype)
    with (
        torch.no_grad()
    ):  # logits around -10, so that a hidden part with the weight of a logit of 0 would outweigh them
        query[..., 0], key[..., 0] = 8, -4
    pieces = [torch.arange(0, 10), torch.arange(10, 11), torch.arange(11, 35)]
    bias = torch.zeros(1, 1, 1, 35)
    for i in hidden:
        bias[..., pieces[i]] = ABSENT
    parts = [attend(query, key[:, :, i], value[:, :, i], SCORE_MOD, bias[..., i]) for i in pieces]
    for i, part in enumerate(parts):
        assert part.output.isfinite().all() and part.lse.isfinite().all()
        assert bool((part.lse < -1e29).all()) is (i in hidden)
    shown = torch.cat([piece for i, piece in enumerate(pieces) if i not in hidden])
    assert_no_worse(combine(parts), query, key[:, :, shown], value[:, :, shown], bias[..., shown])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_parts_only_are_not_nan(dtype: torch.dtype) -> None:
    # The rows of padding tokens: nobody reads them, but NaN would spread through gradients and caches.
    query, key, value = tensors(9, dtype=dtype)
    part = attend(query, key, value, SCORE_MOD, torch.full((1, 1, 1, 9), ABSENT))
    assert combine([part, part, part]).isfinite().all()


def test_combine_by_hand() -> None:
    def part(output: float, lse: float) -> Part:
        return Part(torch.full((1, 1, 1, 2), float(output)), torch.tensor([[[lse]]]).log())

    assert combine([part(1, 3), part(5, 1)]).flatten().tolist() == [pytest.approx(2)] * 2
    assert combine([part(1, 3), part(5, 1), part(10, 4)]).flatten().tolist() == [pytest.approx(6)] * 2
    assert combine([part(7, 2)]).flatten().tolist() == [7, 7]


def test_combine_of_very_different_weights() -> None:
    low, high = (Part(torch.full((1, 1, 1, 1), x), torch.full((1, 1, 1), x)) for x in (-500.0, 500.0))
    for parts in ([low, high, low], [high, low, low], [low, low, high]):
        assert combine(parts).item() == 500


def test_gradients_are_those_of_plain_attention() -> None:
    query, key, value = tensors(35, PATHS["gradient"])
    parts = [attend(query, key[:, :, i], value[:, :, i], SCORE_MOD) for i in random_parts(35)]
    seed = torch.randn(2, 2, 3, 16)
    gradients = torch.autograd.grad((combine(parts) * seed).sum(), (query, key, value))
    expected = torch.autograd.grad((plain(query, key, value)[0] * seed).sum(), (query, key, value))
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


def test_double_precision_stays_double() -> None:
    query, key, value = tensors(63, dtype=torch.float64)
    bias = torch.zeros(1, 1, 1, 63, dtype=torch.float64)
    bias[..., ::5] = ABSENT
    parts = [
        attend(query, key[:, :, s], value[:, :, s], SCORE_MOD, bias[..., s]) for s in (slice(0, 20), slice(20, 63))
    ]
    torch.testing.assert_close(combine(parts), plain(query, key, value, bias)[0], atol=1e-12, rtol=0)
