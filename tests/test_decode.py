"""`gaze_decode` against the definition, with entries that went through the cache as those of a model do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import BASE, LAYOUTS, MORE, SETTINGS, TURNS, Filled, separated, steps
from torch import Tensor

import gazepatch.caches.layer
from gazepatch.config import GazeConfig
from gazepatch.ops import decode
from gazepatch.ops.decode import DecodePlan, gaze_decode
from gazepatch.score_mod import ScoreMod

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]


@torch.no_grad()  # as generation runs: only then is memory that was read into used again
def assert_every_step_is_the_reference(sequence: Any, config: GazeConfig) -> None:
    count = 0
    for position, decoded in steps(Filled(sequence, config)):
        output, kept = sequence.reference(position, config)
        assert decoded.output.shape == (*output.shape[:2], 1, output.shape[2])
        torch.testing.assert_close(decoded.output[:, :, 0], output, atol=2e-5, rtol=0)
        tokens = [sum(span.tokens for span in sequence.seen(row, position)) for row in range(sequence.rows)]
        routed = max(tokens) >= config.min_visual_tokens
        assert int(decoded.read) == (sequence.read(kept, config) if routed else -1)
        count += 1
    assert count == len(sequence.stops) * sequence.steps


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_settings(layout: Any, settings: dict[str, Any], sequences: Make) -> None:
    assert_every_step_is_the_reference(sequences([layout]), replace(BASE, **settings))


@pytest.mark.parametrize("head_reduce", ["mean", "max", "none"])
@pytest.mark.parametrize("layout", ["several, text between", "rows of different images"])
@pytest.mark.parametrize(("key_heads", "group"), [(1, 1), (3, 1), (1, 7), (2, 7), (3, 4)], ids=str)
def test_heads(key_heads: int, group: int, layout: str, head_reduce: str, sequences: Make) -> None:
    sequence = sequences([LAYOUTS[layout]], key_heads=key_heads, group=group)
    assert_every_step_is_the_reference(sequence, replace(BASE, head_reduce=head_reduce))


@pytest.mark.parametrize("settings", ["share", "none", "few tokens in some rows", "everything"])
@pytest.mark.parametrize("layout", ["several, text between", "rows of different images", "divisible"])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 24), (24, 16), (63, 63), (1, 1)], ids=str)
def test_dimensions(dim: int, value_dim: int, layout: str, settings: str, sequences: Make) -> None:
    sequence = sequences([LAYOUTS[layout]], dim=dim, value_dim=value_dim)
    assert_every_step_is_the_reference(sequence, replace(BASE, **SETTINGS[settings]))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize(
    "settings", ["share", "share, no periphery", "max", "none", "windows of one token", "everything"]
)
@pytest.mark.parametrize("layout", ["35", "rows of different images", "a row without an image"])
def test_more_than_dot_products(layout: str, settings: str, more: str, sequences: Make) -> None:
    sequence = MORE[more](sequences([LAYOUTS[layout]], steps=2))
    assert_every_step_is_the_reference(sequence, replace(BASE, **SETTINGS[settings]))


@pytest.mark.parametrize("settings", ["share", "none"])
@pytest.mark.parametrize("turns", ["another image", "rows alike, then not", "images in one row, then in the other"])
def test_biases_over_several_turns(turns: str, settings: str, sequences: Make) -> None:
    sequence, config = sequences(TURNS[turns], steps=2), replace(BASE, **SETTINGS[settings])
    assert_every_step_is_the_reference(MORE["biases"](sequence), config)


@pytest.mark.parametrize("settings", ["share", "max", "none"])
def test_sinks_change_no_selection(settings: str, sequences: Make) -> None:
    sequence, config = sequences([LAYOUTS["100"]]), replace(BASE, **SETTINGS[settings])
    found = []
    for one in (sequence, MORE["sinks"](sequence)):
        filled = Filled(one, config)
        filled.read(0, one.stops[0])
        found.append(filled.decode(one.stops[0]))
    assert torch.equal(found[0].selected, found[1].selected)
    assert not torch.allclose(found[0].output, found[1].output, atol=1e-2)


@pytest.mark.parametrize("settings", ["share", "none", "few tokens in some rows"])
@pytest.mark.parametrize("layout", ["35", "rows of different images", "a row without an image"])
def test_many_steps(layout: str, settings: str, sequences: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # With little room to spare, so that the store grows several times while the steps go on.
    monkeypatch.setattr(gazepatch.caches.layer, "MIN_ROOM", 3)
    assert_every_step_is_the_reference(sequences([LAYOUTS[layout]], steps=11), replace(BASE, **SETTINGS[settings]))


@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "few tokens in some rows"])
@pytest.mark.parametrize("layout", ["100", "divisible", "rows alike", "rows of different images"])
@pytest.mark.parametrize("chunk_bytes", [1, 10_000])
def test_reading_a_few_heads_at_a_time(
    chunk_bytes: int, layout: str, settings: str, sequences: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence, config = sequences([LAYOUTS[layout]], steps=2, key_heads=3), replace(BASE, **SETTINGS[settings])
    sizes = []
    read = DecodePlan.read

    def noted(self: DecodePlan, store: Tensor, pages: Tensor, which: int) -> Tensor:
        sizes.append(len(pages))
        return read(self, store, pages, which)

    monkeypatch.setattr(decode, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(DecodePlan, "read", noted)
    assert_every_step_is_the_reference(sequence, config)
    groups = sequence.rows * (12 if config.head_reduce == "none" else 3)
    assert sum(sizes) == groups * 2 * 2 and max(sizes) < groups


@pytest.mark.parametrize("settings", ["share", "paper", "none", "few tokens in some rows", "everything"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_turns(turns: Any, settings: str, sequences: Make) -> None:
    assert_every_step_is_the_reference(sequences(turns, steps=2), replace(BASE, **SETTINGS[settings]))


@torch.no_grad()
def test_regions_of_other_rows_are_never_selected(sequences: Make) -> None:
    # Keys so far apart that all regions but one score exactly 0, as those do that only the other row has. In the second
    # row these come first, and must not take the place of its own.
    sequence = sequences(TURNS["images in one row, then in the other"])
    sequence, config = replace(sequence, key=1000 * sequence.key), replace(BASE, budget=3, head_reduce="none")
    *_, (position, decoded) = steps(Filled(sequence, config))
    _, kept = sequence.reference(position, config)
    assert int(decoded.read) == sequence.read(kept, config)


def test_a_mask_to_be_added_is_like_a_boolean_one(sequences: Make) -> None:
    sequence = sequences([LAYOUTS["rows of different images"]])
    position, boolean = sequence.stops[0], Filled(sequence, BASE)
    boolean.read(0, position)
    expected = boolean.decode(position, sequence.mask(position))
    added = Filled(sequence, BASE)
    added.read(0, position)
    lowest = torch.zeros(sequence.mask(position).shape).masked_fill(~sequence.mask(position), torch.finfo().min)
    assert torch.equal(added.decode(position, lowest).output, expected.output)


def test_equal_regions_are_read_in_order(sequences: Make) -> None:
    # All keys alike: every region of 16 tokens has the same score, and the first three of eight are read.
    sequence = sequences([[[1, (1, 8, 16), 1]]])
    sequence = replace(sequence, key=torch.ones_like(sequence.key))
    config = replace(BASE, budget=3, periphery=False)
    assert_every_step_is_the_reference(sequence, config)
    _, kept = sequence.reference(sequence.stops[0], config)
    # On 8 rows of 16: of the upper 4 rows, the first 12 columns.
    assert kept[0, 0, 1:129].view(8, 16).nonzero().tolist() == [[i, j] for i in range(4) for j in range(12)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "everything"])
@pytest.mark.parametrize(
    "layout", ["35", "100", "divisible", "rows of different images", "a row without an image", "rows alike"]
)
@torch.no_grad()
def test_low_precision(layout: str, settings: str, dtype: torch.dtype, sequences: Make) -> None:
    config = replace(BASE, **SETTINGS[settings])
    sequence = separated(sequences([LAYOUTS[layout]], dim=64, key_heads=3), config).to(dtype)
    position = sequence.stops[0]
    filled = Filled(sequence, config)
    filled.read(0, position)
    decoded = filled.decode(position, sequence.mask(position))
    output, kept = sequence.reference(position, config)
    assert decoded.output.dtype == dtype and int(decoded.read) == sequence.read(kept, config)
    twin = sequence.twin(position, config, kept)
    error, usual = ((x.float() - output).abs().max().item() for x in (decoded.output[:, :, 0], twin))
    rounding = torch.finfo(dtype).eps / 2 * output.abs().max().item()
    assert error <= 2 * usual + rounding, f"error {error:.2e}, plain attention in {dtype} has {usual:.2e}"


@pytest.mark.parametrize("layout", ["rows of different images", "rows alike", "rows of one count and two sizes"])
@pytest.mark.parametrize("rows", [[0], [1], [1, 0], [0, 0, 1, 1, 1]], ids=str)
@torch.no_grad()
def test_rows_selected_from_the_cache(layout: str, rows: list[int], sequences: Make) -> None:
    sequence = sequences([LAYOUTS[layout]], steps=2)
    position = sequence.stops[0]
    filled = Filled(sequence, BASE)
    filled.read(0, position)
    filled.decode(position, sequence.mask(position))
    filled.layer.batch_select_indices(torch.tensor(rows))
    names = {name: getattr(sequence, name)[rows] for name in ("query", "key", "value", "visible")}
    spans = [replace(span, row=row) for row, of in enumerate(rows) for span in sequence.spans if span.row == of]
    filled.sequence = sequence = replace(sequence, spans=spans, **names)
    decoded = filled.decode(position + 1, sequence.mask(position + 1))
    output, kept = sequence.reference(position + 1, BASE)
    torch.testing.assert_close(decoded.output[:, :, 0], output, atol=2e-5, rtol=0)
    assert int(decoded.read) == sequence.read(kept, BASE)


@pytest.mark.parametrize("rows", [[0], [1]], ids=str)
@torch.no_grad()
def test_rows_selected_whose_regions_have_other_sizes(rows: list[int], sequences: Make) -> None:
    # Regions of 4 and 2 tokens in one row and of 9 in the other: what is read at once must fit the store of both.
    sequence = sequences([[[1, (1, 4, 4), 1, (1, 1, 2), 1], [1, (1, 3, 9), 1]]], steps=2)
    config = replace(BASE, region=(3, 3, 1), window=None, budget=1)
    position = sequence.stops[0]
    filled = Filled(sequence, config)
    filled.read(0, position)
    filled.layer.batch_select_indices(torch.tensor(rows))
    names = {name: getattr(sequence, name)[rows] for name in ("query", "key", "value", "visible")}
    spans = [replace(span, row=0) for span in sequence.spans if span.row == rows[0]]
    filled.sequence = sequence = replace(sequence, spans=spans, **names)
    decoded = filled.decode(position, sequence.mask(position))
    output, _ = sequence.reference(position, config)
    torch.testing.assert_close(decoded.output[:, :, 0], output, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", ["share", "share, no periphery", "none", "few tokens in some rows", "everything"])
@pytest.mark.parametrize("layout", ["100", "divisible", "rows of different images"])
def test_gradients(layout: str, settings: str, sequences: Make) -> None:
    sequence, config = sequences([LAYOUTS[layout]]), replace(BASE, **SETTINGS[settings])
    inputs = [x.requires_grad_() for x in (sequence.query, sequence.key, sequence.value)]
    position = sequence.stops[0]
    filled = Filled(sequence, config)
    filled.read(0, position)
    decoded, (output, _) = filled.decode(position, sequence.mask(position)), sequence.reference(position, config)
    seed = torch.randn_like(output)
    gradients = torch.autograd.grad((decoded.output[:, :, 0] * seed).sum(), inputs)
    for actual, expected in zip(gradients, torch.autograd.grad((output * seed).sum(), inputs), strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_gradients_of_a_query_through_layers_that_share_a_plan(sequences: Make) -> None:
    # Frozen keys, as with an adapter on the query projection: what a layer read must outlive the next layer's reading.
    sequence = sequences([LAYOUTS["divisible"]])
    position = sequence.stops[0]
    filled = Filled(sequence, BASE)
    filled.read(0, position)
    filled.begin(position, position + 1)
    entries = filled.layer.entries()
    query = sequence.query[:, :, position : position + 1].clone().requires_grad_()
    plan = filled.state.plan(query, entries)
    layers = ScoreMod(0.25), ScoreMod(0.5)
    outputs = [gaze_decode(query, entries, plan, score_mod).output.sum() for score_mod in layers]
    (together,) = torch.autograd.grad(sum(outputs), query)
    alone = [
        torch.autograd.grad(gaze_decode(query, entries, plan, score_mod).output.sum(), query)[0] for score_mod in layers
    ]
    torch.testing.assert_close(together, sum(alone))


def test_plan_is_kept_until_new_regions_come(sequences: Make) -> None:
    sequence = sequences(TURNS["another image"], steps=2)
    filled, plans = Filled(sequence, BASE), []
    for position, _ in steps(filled):
        query = sequence.query[:, :, position : position + 1]
        plans.append(filled.state.plan(query, filled.layer.entries()))
    assert plans[0] is plans[1] and plans[2] is plans[3] and plans[1] is not plans[2]


@pytest.mark.parametrize(
    ("settings", "visual", "read"),
    [
        # 6 x 6 tokens in regions of 4 x 4: 16, 8, 8, 4
        ({"budget": 1.0}, 2 * 36, 2 * 36),
        ({"budget": 4}, 2 * 36, 2 * 36),
        ({"budget": 1.0, "head_reduce": "none"}, 8 * 36, 8 * 36),
        ({"budget": 3}, 2 * 36, 2 * 32),
    ],
    ids=["share", "number", "each head", "all but one"],
)
def test_read_by_hand(settings: dict[str, Any], visual: int, read: int, sequences: Make) -> None:
    sequence = sequences([[[1, (1, 6, 6), 1]]])
    # The further right and down, the worse: the last region has the lowest score for every head.
    key, query = torch.zeros_like(sequence.key), torch.ones_like(sequence.query)
    key[:, :, 1:37, 0] = -torch.arange(36.0) - 6 * (torch.arange(36) % 6)
    sequence = replace(sequence, key=key, query=query)
    filled = Filled(sequence, replace(BASE, **settings))
    filled.read(0, sequence.stops[0])
    decoded = filled.decode(sequence.stops[0])
    filled.begin(sequence.stops[0] + 1, sequence.stops[0] + 1)
    plan = DecodePlan(filled.state.regions, filled.config, 1, 8, 2)  # type: ignore[arg-type]
    assert plan.visual_entries == visual and int(decoded.read) == read
