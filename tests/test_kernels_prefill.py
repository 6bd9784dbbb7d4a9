"""The kernels for the routed queries of a prompt against their twin, gradients included: natively or interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import MORE
from test_prefill import BASE, LAYOUTS, SETTINGS, masks, text
from torch import Tensor

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.ops.prefill import Keys, Queries, gaze_prefill

pytest.importorskip("triton")
from gazepatch.kernels.routed import routed

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def gazed(sequence: Any, config: GazeConfig, positions: Tensor, mask_kind: str) -> tuple[Tensor, list[Tensor]]:
    """`[B, H, Q, D_v]` of the queries at `positions`, and the gradients of all queries, keys and values."""
    owner = torch.nn.Module()
    state = GazeState(owner, config)
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in (sequence.query, sequence.key, sequence.value)]
    query, key, value = leaves
    state.begin(sequence.spans, sequence.rows, key.shape[2])
    layer = GazeLayer(state, gazes=True, leads=True)
    layer.update(key, value)
    mask = masks(sequence, positions, mask_kind)
    positions = positions.to(DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    score_mod = state.laid(sequence.score_mod(slice(None), key.shape[2])).of_queries(positions)
    assert layer.mean_keys is not None
    tables = state.table("regions", DEVICE), state.table("region_of", DEVICE)
    keys = Keys(key, value, layer.mean_keys, layer.mean_values, *tables)
    output = gaze_prefill(Queries(query[:, :, positions], positions, mask, score_mod), keys, config)
    torch.manual_seed(1)
    rows = text(sequence)[:, positions.cpu()].to(DEVICE)
    gradient = torch.randn(output.shape).to(DEVICE, output.dtype) * rows[:, None, :, None]
    return output, list(torch.autograd.grad(output, leaves, gradient))


CASES = [
    ("36, then 63", "share", "none"),
    ("three images", "none", "boolean"),
    ("rows of different images", "share", "boolean"),
    ("rows alike", "share", "added"),
]


@pytest.mark.parametrize(("layout", "settings", "mask"), CASES, ids=str)
def test_outputs_and_gradients(layout: str, settings: str, mask: str, sequences: Make) -> None:
    sequence = sequences([LAYOUTS[layout]], steps=0, key_heads=1, group=3, dim=12, value_dim=20)
    config = replace(BASE, **SETTINGS[settings])
    is_text = text(sequence)
    positions = is_text.any(0).nonzero()[:, 0]
    expected, of_expected = gazed(sequence, replace(config, backend="torch"), positions, mask)
    output, gradients = gazed(sequence, replace(config, backend="triton"), positions, mask)
    assert output.isfinite().all()
    rows = is_text[:, positions].to(DEVICE)[:, None, :, None]
    torch.testing.assert_close(output * rows, expected * rows, atol=2e-5, rtol=0)
    for ours, theirs in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("more", "mask"),
    [("sinks", "none"), ("soft cap and sinks", "none"), ("soft cap", "added"), ("biases", "none")],
    ids=str,
)
def test_more_than_dot_products(more: str, mask: str, sequences: Make) -> None:
    # Sinks are a part beside what the kernels read; biases are left to the twin.
    sequence = MORE[more](sequences([LAYOUTS["three images"]], steps=0))
    positions = text(sequence).any(0).nonzero()[:, 0]
    given = {name: getattr(sequence, name) for name in ("sinks", "bias")}
    sequence = replace(sequence, **{name: x.to(DEVICE) for name, x in given.items() if x is not None})
    expected, of_expected = gazed(sequence, replace(BASE, backend="torch"), positions, mask)
    output, gradients = gazed(sequence, replace(BASE, backend="triton"), positions, mask)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)
    for ours, theirs in zip(gradients, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def arguments(dtype: torch.dtype = torch.float32, tokens: int = 35) -> tuple[Any, ...]:
    query = torch.randn(2, 1, 3 * 4, 16, device=DEVICE)
    key = torch.randn(2, 1, tokens, 16, device=DEVICE)
    region_of = torch.randint(-1, 5, (1, tokens), device=DEVICE).int()
    taken = torch.randint(0, 2, (2, 1, 3, 1, 5), device=DEVICE).to(torch.int8)
    positions = torch.tensor([0, 9, tokens - 1], dtype=torch.int32, device=DEVICE)
    return query.to(dtype), key.to(dtype), key.to(dtype), region_of, taken, positions, None, 0.25, None


def test_a_query_that_sees_nothing_gives_zero() -> None:
    query, key, value, region_of, taken, *rest = arguments()
    output, _ = routed(query, key, value, region_of.clamp(min=0), torch.zeros_like(taken), *rest)
    assert torch.equal(output, torch.zeros_like(output))


def test_the_operator_is_sound() -> None:
    query, key, value, *rest = arguments()
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(
        routed, (*leaves, *rest), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU")])


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    leaves = [x.float().requires_grad_() for x in given[:3]]
    exact, _ = routed(*leaves, *given[3:])
    low = [x.clone().requires_grad_() for x in given[:3]]
    output, _ = routed(*low, *given[3:])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), exact, atol=4 * eps, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(output.sum(), low), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs, atol=16 * eps * float(theirs.abs().max()), rtol=0)
