"""`gaze_prefill` against the definition, query by query, with tables and means as the cache makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import MORE
from torch import Tensor

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.counters import PromptReads, QueryReads
from gazepatch.ops import prefill
from gazepatch.ops.prefill import Keys, Queries, gaze_prefill

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]

BASE = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.3, prefill="gaze", min_visual_tokens=0)

#: Rows of text tokens (numbers) and images (t, h, w), (t, h, w, row gap) or (tokens,) without a grid
LAYOUTS: dict[str, list[list[Any]]] = {
    "one token": [[1, (1, 1, 1), 2]],
    "35": [[3, (1, 5, 7), 4]],
    "36, then 63": [[(1, 6, 6), 1, (1, 7, 9), 2]],
    "100": [[1, (1, 10, 10), 2]],
    "three images": [[2, (1, 4, 4), 1, (1, 5, 3), (1, 6, 6), 2]],
    "video, gaps, no grid": [[1, (3, 4, 3), 1, (1, 5, 4, 1), 2, (35,), 2]],
    "rows alike": [[1, (1, 5, 7), 2, (1, 4, 4), 1]] * 2,
    "rows of different images": [[5, (1, 6, 6), 3], [(1, 5, 7), 2, (1, 7, 9), 3], [1, (3, 4, 3), 5]],
    "a row without an image": [[9], [2, (1, 6, 7), 3]],
}

SETTINGS: dict[str, dict[str, Any]] = {
    "share": {},
    "share, no periphery": {"periphery": False},
    "number": {"budget": 2},
    "paper": {"window": None, "budget": 0.125, "periphery": False},
    "windows of one token": {"region": (3, 3, 2), "window": (1, 1, 1)},
    "max": {"head_reduce": "max"},
    "none": {"head_reduce": "none"},
    "everything": {"budget": 1.0},
}


def masks(sequence: Any, positions: Tensor, kind: str) -> Tensor | None:
    """What transformers makes for the queries at `positions`: causal, without padding."""
    if kind == "none":
        return None
    length = sequence.key.shape[2]
    mask = (torch.arange(length) <= positions[:, None]) & sequence.visible[:, None, None]
    return mask if kind == "boolean" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)


def text(sequence: Any) -> Tensor:
    """`[B, L]` tokens that are neither visual, nor between the rows of an image, nor padding."""
    is_text: Tensor = sequence.visible.clone()
    for span in sequence.spans:
        is_text[span.row, span.start : span.stop] = False
    return is_text


def gazed(
    sequence: Any, config: GazeConfig, positions: Tensor, mask: Tensor | None, reads: PromptReads | None = None
) -> Tensor:
    """`[B, H, Q, D_v]` of the queries at `positions`."""
    owner = torch.nn.Module()
    state = GazeState(owner, config)
    layer = GazeLayer(state, gazes=True, leads=True)
    state.begin(sequence.spans, sequence.rows, sequence.key.shape[2])
    key, value = layer.update(sequence.key, sequence.value)
    assert state.regions is not None and layer.mean_keys is not None
    keys = Keys(key, value, layer.mean_keys, layer.mean_values, state.regions, state.region_of())
    score_mod = state.laid(sequence.score_mod(slice(None), key.shape[2])).of_queries(positions)
    counted = None if reads is None else QueryReads(reads, reads.tokens[:, positions])
    return gaze_prefill(Queries(sequence.query[:, :, positions], positions, mask, score_mod, counted), keys, config)


def assert_every_query_is_the_reference(sequence: Any, config: GazeConfig, mask_kind: str) -> None:
    is_text = text(sequence)
    positions = is_text.any(0).nonzero()[:, 0]
    output = gazed(sequence, config, positions, masks(sequence, positions, mask_kind))
    assert output.isfinite().all()  # also where a row has no text at these positions
    for index, position in enumerate(positions.tolist()):
        expected, _ = sequence.reference(position, config)
        rows = is_text[:, position]
        torch.testing.assert_close(output[rows, :, index], expected[rows], atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_settings(layout: Any, settings: dict[str, Any], sequences: Make) -> None:
    assert_every_query_is_the_reference(sequences([layout], steps=0), replace(BASE, **settings), "boolean")


@pytest.mark.parametrize(
    "layout", ["36, then 63", "three images", "rows of different images", "a row without an image"]
)
@pytest.mark.parametrize("periphery", [True, False], ids=["periphery", "bare"])
def test_few_tokens(layout: str, periphery: bool, sequences: Make) -> None:
    # The first queries of a row see too few visual tokens to select among them, later ones see enough.
    config = replace(BASE, min_visual_tokens=37, periphery=periphery)
    assert_every_query_is_the_reference(sequences([LAYOUTS[layout]], steps=0), config, "boolean")


@pytest.mark.parametrize("more", [None, "biases"])
@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
@pytest.mark.parametrize("layout", ["three images", "rows alike"])
def test_masks(kind: str, layout: str, more: str | None, sequences: Make) -> None:
    sequence = sequences([LAYOUTS[layout]], steps=0)
    assert_every_query_is_the_reference(MORE[more](sequence) if more else sequence, BASE, kind)


def test_an_added_mask_with_padding(sequences: Make) -> None:
    sequence = sequences([LAYOUTS["rows of different images"]], steps=0)
    assert_every_query_is_the_reference(sequence, BASE, "added")


@pytest.mark.parametrize("head_reduce", ["mean", "none"])
@pytest.mark.parametrize(("key_heads", "group"), [(1, 1), (3, 1), (2, 7)], ids=str)
def test_heads(key_heads: int, group: int, head_reduce: str, sequences: Make) -> None:
    sequence = sequences([LAYOUTS["rows of different images"]], steps=0, key_heads=key_heads, group=group)
    assert_every_query_is_the_reference(sequence, replace(BASE, head_reduce=head_reduce), "boolean")


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "everything"])
@pytest.mark.parametrize("layout", ["36, then 63", "rows of different images"])
def test_more_than_dot_products(layout: str, settings: str, more: str, sequences: Make) -> None:
    sequence = MORE[more](sequences([LAYOUTS[layout]], steps=0))
    assert_every_query_is_the_reference(sequence, replace(BASE, **SETTINGS[settings]), "boolean")


def test_other_value_dimension(sequences: Make) -> None:
    sequence = sequences([LAYOUTS["three images"]], steps=0, value_dim=24)
    assert_every_query_is_the_reference(sequence, BASE, "boolean")


@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
@pytest.mark.parametrize("queries", [1, 2, 3])
def test_blocks_of_queries(queries: int, kind: str, sequences: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = MORE["sinks of queries"](sequences([LAYOUTS["rows alike"]], steps=0))
    positions = text(sequence)[0].nonzero()[:, 0]
    assert len(positions) == 4
    mask = masks(sequence, positions, kind)
    at_once = gazed(sequence, BASE, positions, mask)
    rows, heads, length, _ = sequence.query.shape
    sizes = []
    block = prefill._block

    def noted(queries: Queries, *args: Any) -> Tensor:
        sizes.append(len(queries.positions))
        return block(queries, *args)

    monkeypatch.setattr(prefill, "_block", noted)
    monkeypatch.setattr(prefill, "BLOCK_ELEMENTS", queries * rows * heads * length)
    torch.testing.assert_close(gazed(sequence, BASE, positions, mask), at_once, atol=1e-6, rtol=0)
    assert sizes == {1: [1, 1, 1, 1], 2: [2, 2], 3: [3, 1]}[queries]


@pytest.mark.parametrize("settings", ["share", "number", "none", "everything"])
@pytest.mark.parametrize(
    "layout", ["36, then 63", "three images", "rows of different images", "a row without an image"]
)
@pytest.mark.parametrize("least", [0, 37])
def test_reads_are_counted(
    least: int, layout: str, settings: str, sequences: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = sequences([LAYOUTS[layout]], steps=0)
    config = replace(BASE, min_visual_tokens=least, **SETTINGS[settings])
    positions = text(sequence).any(0).nonzero()[:, 0]
    rows, heads, length, _ = sequence.query.shape
    monkeypatch.setattr(prefill, "BLOCK_ELEMENTS", 2 * rows * heads * length)
    reads = PromptReads(text(sequence))
    gazed(sequence, config, positions, masks(sequence, positions, "boolean"), reads)
    # The reference counts for every query head, those of a key head alike.
    selections = heads if config.head_reduce == "none" else sequence.key.shape[1]
    visual = read = 0
    for position in positions.tolist():
        _, kept = sequence.reference(position, config)
        for row in text(sequence)[:, position].nonzero()[:, 0].tolist():
            spans = [span for span in sequence.spans if span.row == row and span.stop <= position]
            seen = [at for span in spans for at in span.positions()]
            visual += selections * len(seen)
            read += int(kept[row][:, seen].sum()) * selections // heads
    assert (reads.visual, reads.read) == (visual, read)
    assert reads.share == read / visual and (reads.share < 1) == (settings != "everything")


def test_images_after_a_query_do_not_count(sequences: Make) -> None:
    # With half a budget, one image of two regions gives one of them; two images of two give two.
    sequence = sequences([[[(1, 4, 8), 1, (1, 4, 8), 1]]], steps=0)
    config = replace(BASE, budget=0.5, periphery=False)
    positions = torch.tensor([32, 65])
    changed = replace(sequence, key=sequence.key.clone(), value=sequence.value.clone())
    changed.key[:, :, 33:] = changed.value[:, :, 33:] = 1e3
    before, after = (gazed(s, config, positions, None) for s in (sequence, changed))
    assert torch.equal(before[:, :, 0], after[:, :, 0]) and not torch.equal(before[:, :, 1], after[:, :, 1])
    kept = [sequence.reference(position, config)[1][0, 0].sum().item() for position in positions.tolist()]
    assert kept == [16 + 1, 2 * 16 + 2]


def test_a_query_before_every_image_reads_what_is_before_it(sequences: Make) -> None:
    sequence = sequences([[[3, (1, 6, 6), 1]]], steps=0)
    output = gazed(sequence, BASE, torch.tensor([1]), None)[0, :, 0]
    key, value = (x[0, :, :2].repeat_interleave(4, 0) for x in (sequence.key, sequence.value))
    query = sequence.query[0, :, 1:2]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=sequence.scale)[:, 0]
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("more", [None, "soft cap and sinks", "biases"])
@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "everything"])
@pytest.mark.parametrize("layout", ["35", "three images", "rows of different images"])
def test_gradients(layout: str, settings: str, more: str | None, sequences: Make) -> None:
    sequence, config = sequences([LAYOUTS[layout]], steps=0), replace(BASE, **SETTINGS[settings])
    sequence = MORE[more](sequence) if more else sequence
    given = (sequence.query, sequence.key, sequence.value, sequence.sinks, sequence.bias)
    inputs = [x.requires_grad_() for x in given if x is not None]
    is_text = text(sequence)
    positions = is_text.any(0).nonzero()[:, 0]
    output = gazed(sequence, config, positions, masks(sequence, positions, "boolean"))
    reference = torch.stack([sequence.reference(position, config)[0] for position in positions.tolist()], 2)
    # Only what is text in a row is compared, but the others must not send it NaN.
    seed = torch.randn_like(reference) * is_text[:, None, positions, None]
    expected = torch.autograd.grad((reference.nan_to_num() * seed).sum(), inputs)
    for actual, wanted in zip(torch.autograd.grad((output * seed).sum(), inputs), expected, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", ["share", "share, no periphery", "everything"])
@pytest.mark.parametrize("layout", ["35", "three images", "rows of different images"])
def test_gradients_are_those_of_masked_attention(layout: str, settings: str, sequences: Make) -> None:
    sequence, config = sequences([LAYOUTS[layout]], steps=0), replace(BASE, **SETTINGS[settings])
    position = sequence.key.shape[2] - 1
    inputs = [x.requires_grad_() for x in (sequence.query, sequence.key, sequence.value)]
    positions = torch.tensor([position])
    output = gazed(sequence, config, positions, masks(sequence, positions, "boolean"))[:, :, 0]
    twin = sequence.twin(position, config, sequence.reference(position, config)[1])
    seed = torch.randn_like(twin)
    expected = torch.autograd.grad((twin * seed).sum(), inputs)
    for actual, wanted in zip(torch.autograd.grad((output * seed).sum(), inputs), expected, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "everything"])
@pytest.mark.parametrize("layout", ["35", "three images", "rows of different images"])
def test_low_precision(layout: str, settings: str, dtype: torch.dtype, sequences: Make) -> None:
    config = replace(BASE, **SETTINGS[settings])
    sequence = sequences([LAYOUTS[layout]], steps=0).to(dtype)
    positions = torch.tensor([sequence.key.shape[2] - 1])
    output = gazed(sequence, config, positions, masks(sequence, positions, "boolean"))[:, :, 0]
    expected, kept = sequence.reference(int(positions), config)
    twin = sequence.twin(int(positions), config, kept)
    assert output.dtype == dtype
    error, usual = ((x.float() - expected).abs().max().item() for x in (output, twin))
    rounding = torch.finfo(dtype).eps / 2 * expected.abs().max().item()
    assert error <= 2 * usual + rounding, f"error {error:.2e}, plain attention in {dtype} has {usual:.2e}"
