"""Tables of context tokens, written out by hand, and calls of a decoder spread over them and shortened again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from gazepatch.caches.state import GazeState
from gazepatch.caches.window import WindowLayer
from gazepatch.config import GazeConfig
from gazepatch.errors import UnsupportedModelError
from gazepatch.insertion import Insertion, Slots, insert
from gazepatch.layout import Span
from gazepatch.running.splice import lengthen, shorten

X = -1  # padding, or nothing
CONFIG = GazeConfig(context_tokens=2, min_visual_tokens=10**6)


def span(start: int, stop: int, row: int = 0, media: int = 0, grid: Any = None, **names: int) -> Span:
    return Span(row, start, stop, grid or (1, 1, stop - start), media, **names)


def inserted(*spans: Span, rows: int = 1, tokens: int = 6, count: int = 2) -> Insertion:
    made = insert(spans, rows, tokens, count)
    assert made is not None
    # Every token is in its slot, in every layout.
    assert torch.equal(made.source.gather(1, made.slots), torch.arange(tokens).expand(rows, -1))
    assert (made.context.gather(1, made.slots) == -1).all()
    return made


# ---- one forward


def test_one_image() -> None:
    made = inserted(span(1, 4))
    assert made.source.tolist() == [[0, 1, 2, 3, 3, 3, 4, 5]]
    assert made.context.tolist() == [[X, X, X, X, 0, 1, X, X]]
    assert made.image.tolist() == [[X, 0, 0, 0, 0, 0, X, X]]
    assert made.slots.tolist() == [[0, 1, 2, 3, 6, 7]]
    assert (made.count, made.inserted) == (2, 2)


def test_an_image_at_either_end() -> None:
    made = inserted(span(0, 2), span(4, 6, media=1), count=1)
    assert made.source.tolist() == [[0, 1, 1, 2, 3, 4, 5, 5]]
    assert made.context.tolist() == [[X, X, 0, X, X, X, X, 0]]
    assert made.image.tolist() == [[0, 0, 0, X, X, 1, 1, 1]]
    assert made.slots.tolist() == [[0, 1, 3, 4, 5, 6]]


def test_nothing_to_insert() -> None:
    assert insert([], 2, 6, 4) is None
    assert insert([span(1, 4)], 1, 6, 0) is None


def test_rows_with_different_numbers_of_images() -> None:
    rows = span(1, 3), span(0, 1, row=1), span(3, 5, row=1, media=1)
    made = inserted(*rows, rows=3, tokens=5, count=1)
    assert made.source.tolist() == [[X, 0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 3, 4, 4], [X, X, 0, 1, 2, 3, 4]]
    assert made.context.tolist() == [[X, X, X, X, 0, X, X], [X, 0, X, X, X, X, 0], [X] * 7]
    assert made.image.tolist() == [[X, X, 0, 0, 0, X, X], [0, 0, X, X, 1, 1, 1], [X] * 7]
    assert made.slots.tolist() == [[1, 2, 3, 5, 6], [0, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    assert made.inserted == 2
    assert [(s.row, s.start, s.stop) for s in made.moved(rows)] == [(0, 2, 4), (1, 0, 1), (1, 4, 6)]


def test_frames_of_a_joined_video_have_their_own() -> None:
    video = span(1, 7, grid=(3, 1, 2))
    made = inserted(video, tokens=8, count=2)
    assert made.source.tolist() == [[0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7]]
    assert made.image.tolist() == [[X, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, X]]
    (moved,) = made.moved([video])
    assert (moved.start, moved.stop, moved.frame_gap, moved.grid) == (1, 11, 2, (3, 1, 2))
    assert moved.positions() == [1, 2, 5, 6, 9, 10] and moved.tokens == 6


def test_frames_that_are_spans_have_their_own() -> None:
    frames = [span(0, 2, frame=0), span(3, 5, frame=1)]
    made = inserted(*frames, count=1)
    assert made.source.tolist() == [[0, 1, 1, 2, 3, 4, 4, 5]]
    assert made.image.tolist() == [[0, 0, 0, X, 1, 1, 1, X]]
    assert [(s.start, s.stop, s.frame_gap) for s in made.moved(frames)] == [(0, 2, 0), (4, 6, 0)]


def test_tiles_of_an_image_share_theirs() -> None:
    tiles = [span(0, 2, tile=0), span(2, 4, tile=1), span(4, 5, media=1)]
    made = inserted(*tiles, count=1)
    assert made.source.tolist() == [[0, 1, 2, 3, 3, 4, 4, 5]]
    assert made.image.tolist() == [[0, 0, 0, 0, 0, 1, 1, X]]
    assert [(s.start, s.stop) for s in made.moved(tiles)] == [(0, 2), (2, 4), (5, 6)]


def test_what_is_between_the_rows_of_an_image_is_not_the_image() -> None:
    image = span(1, 6, grid=(1, 2, 2), row_gap=1)
    made = inserted(image, tokens=7, count=1)
    assert made.image.tolist() == [[X, 0, 0, X, 0, 0, 0, X]]
    (moved,) = made.moved([image])
    assert moved == image and moved.positions() == [1, 2, 4, 5]


def test_an_image_without_a_grid() -> None:
    made = inserted(Span(0, 1, 4, None, 0), count=1)
    assert made.image.tolist() == [[X, 0, 0, 0, 0, X, X]]
    assert made.moved([Span(0, 1, 4, None, 0)]) == [Span(0, 1, 4, None, 0)]


def test_own_image() -> None:
    made = inserted(span(1, 3), span(0, 1, row=1), span(3, 5, row=1, media=1), rows=2, tokens=5, count=2)
    own = made.own_image()
    assert made.image.tolist() == [[X, X, X, 0, 0, 0, 0, X, X], [0, 0, 0, X, X, 1, 1, 1, 1]]
    assert own.columns.tolist() == [1, 2, 5, 6, 7, 8]
    assert own.rows.tolist() == [[False, False, True, True, False, False], [True, True, False, False, True, True]]
    seen = [[row[c].nonzero()[:, 0].tolist() for c in range(6)] for row in own.visible[:, 0]]
    everything = list(range(9))
    assert seen[0] == [everything, everything, [3, 4, 5], [3, 4, 5, 6], everything, everything]
    assert seen[1] == [[0, 1], [0, 1, 2], everything, everything, [5, 6, 7], [5, 6, 7, 8]]


# ---- several forwards


def test_slots_of_two_turns() -> None:
    slots = Slots()
    assert slots.last_context() == -1
    assert [table.tolist() for table in slots.upto(3)] == [[[0, 1, 2]], [[False] * 3]]
    slots.add(inserted(span(1, 3), rows=2, tokens=4, count=1), 0)
    assert (slots.inserted, slots.recorded, slots.context_tokens, slots.padded) == (1, 5, 1, True)
    assert [table.tolist() for table in slots.upto(7)] == [
        [[0, 1, 2, 2, 3, 4, 5], [X, 0, 1, 2, 3, 4, 5]],
        [[False, False, False, True, False, False, False], [False] * 7],
    ]
    assert slots.upto(2)[0].tolist() == [[0, 1], [X, 0]]
    # Two tokens of text were decoded; the second turn starts at slot 7, and its tokens are those from the sixth on.
    slots.add(inserted(span(0, 2), span(0, 1, row=1), rows=2, tokens=3, count=2), 7)
    assert slots.source is not None and slots.context is not None
    assert slots.source.tolist() == [[0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 7, 8], [X, 0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 8]]
    assert slots.context.nonzero().tolist() == [[0, 3], [0, 9], [0, 10], [1, 8], [1, 9]]
    assert (slots.inserted, slots.recorded, slots.context_tokens, slots.last_context()) == (3, 12, 5, 10)


def test_slots_of_an_image_after_text() -> None:
    slots = Slots()
    slots.add(inserted(span(0, 1), rows=2, tokens=2, count=1), 3)
    assert slots.source is not None
    assert slots.source.tolist() == [[0, 1, 2, 3, 3, 4], [0, 1, 2, X, 3, 4]]
    assert (slots.inserted, slots.context_tokens, slots.last_context()) == (1, 1, 4)


def test_crop_and_select_rows() -> None:
    slots = Slots()
    slots.crop(3)
    slots.select_rows(torch.tensor([0, 0]))
    assert slots.source is None
    slots.add(inserted(span(1, 3), rows=2, tokens=5, count=1), 0)
    slots.crop(8)
    assert slots.recorded == 6
    slots.crop(4)
    assert [table.tolist() for table in slots.upto(6)] == [
        [[0, 1, 2, 2, 3, 4], [X, 0, 1, 2, 3, 4]],
        [[False, False, False, True, False, False], [False] * 6],
    ]
    slots.select_rows(torch.tensor([1, 0, 0]))
    assert slots.source is not None and slots.source[:, 0].tolist() == [X, 0, 0]
    assert slots.context_tokens == 2


# ---- calls of a decoder


class Turn:
    """A forward of two rows of six tokens: an image in the first, text in the second.

    Slots of the first row hold tokens 0 1 2 3, two context tokens, 4 5; those of the second two of padding and 0 to 5.
    """

    def __init__(self, cached: bool = False) -> None:
        self.owner = torch.nn.Module()
        self.state = GazeState(self.owner, CONFIG)
        self.cache = DynamicCache() if cached else None
        self.hidden = torch.randn(2, 6, 3)
        self.embeddings = torch.randn(2, 3)
        self.insertion = inserted(span(1, 4), rows=2)
        self.state.begin(self.insertion.moved([span(1, 4)]), 2, 8, self.insertion)

    def lengthened(self, **arguments: Any) -> dict[str, Any]:
        return lengthen(
            {"inputs_embeds": self.hidden, **arguments}, self.state, self.insertion, self.embeddings, self.cache
        )

    def decoded(self, given: Any) -> Any:
        """The mask of a decode step after it."""
        self.state.finish(completed=True)
        self.state.begin([], 2, 1)
        call = {"inputs_embeds": self.hidden[:, :1], "attention_mask": given}
        return lengthen(call, self.state, None, self.embeddings, DynamicCache())["attention_mask"]


def causal(tokens: int = 6) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]


def test_embeddings_and_positions() -> None:
    turn = Turn()
    call = turn.lengthened(position_ids=torch.arange(10, 16)[None], cache_position=torch.arange(6), use_cache=True)
    assert torch.equal(call["inputs_embeds"][0, [0, 1, 2, 3, 6, 7]], turn.hidden[0])
    assert torch.equal(call["inputs_embeds"][0, 4:6], turn.embeddings)
    assert torch.equal(call["inputs_embeds"][1, 2:], turn.hidden[1]) and not call["inputs_embeds"][1, :2].any()
    assert call["position_ids"].tolist() == [[10, 11, 12, 13, 13, 13, 14, 15], [10, 10, 10, 11, 12, 13, 14, 15]]
    assert call["cache_position"].tolist() == list(range(8))
    assert call["use_cache"] is True


def test_positions_of_several_axes() -> None:
    positions = torch.stack([torch.arange(6) + 10 * axis for axis in range(3)])[:, None].expand(3, 2, 6)
    found = Turn().lengthened(position_ids=positions)["position_ids"]
    assert found.shape == (3, 2, 8)
    assert found[2, 0].tolist() == [20, 21, 22, 23, 23, 23, 24, 25]


def test_positions_are_counted_where_none_are_given() -> None:
    turn = Turn()
    assert turn.lengthened()["position_ids"][0].tolist() == [0, 1, 2, 3, 3, 3, 4, 5]
    turn.state.finish(completed=True)
    turn.state.begin([], 2, 1)
    call = lengthen({"inputs_embeds": turn.hidden[:, :1]}, turn.state, None, turn.embeddings, DynamicCache())
    assert call["position_ids"].tolist() == [[6]]


def test_whatever_goes_along_with_the_tokens_is_spread() -> None:
    marks, layers = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, 4, 5)
    call = Turn().lengthened(visual_pos_masks=marks, per_layer_inputs=layers, other=torch.ones(6, 2), nothing=None)
    expected = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    assert torch.equal(call["visual_pos_masks"], expected.bool())
    assert torch.equal(call["per_layer_inputs"], expected[..., None, None].expand(2, 8, 4, 5).float())
    assert call["other"].shape == (6, 2) and call["nothing"] is None


def test_token_ids_cannot_be_lengthened() -> None:
    turn = Turn()
    with pytest.raises(UnsupportedModelError, match=r"inputs_embeds, got input_ids.*context_tokens=0"):
        lengthen({"input_ids": torch.ones(2, 6)}, turn.state, turn.insertion, turn.embeddings, None)


def test_a_padding_mask() -> None:
    given = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    turn = Turn()
    expected = [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert turn.lengthened(attention_mask=given)["attention_mask"].tolist() == expected
    longer = torch.cat([given, torch.tensor([[1], [1]])], 1)
    assert turn.decoded(longer).tolist() == [[*row, 1] for row in expected]


def test_an_image_in_padding_hides_its_context_tokens() -> None:
    given = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert Turn().lengthened(attention_mask=given)["attention_mask"][0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("cached", [False, True])
def test_no_mask_hides_the_padding_between_rows(cached: bool) -> None:
    found = Turn(cached).lengthened(attention_mask=None)["attention_mask"]
    assert found.tolist() == [[1] * 8, [0, 0] + [1] * 6]


def test_no_mask_stays_none_where_nothing_is_padded() -> None:
    def lengthened(cache: Any) -> Any:
        owner, insertion = torch.nn.Module(), inserted(span(1, 4))
        state = GazeState(owner, CONFIG)
        state.begin(insertion.moved([span(1, 4)]), 1, 8, insertion)
        call = {"inputs_embeds": torch.randn(1, 6, 3), "attention_mask": None}
        return lengthen(call, state, insertion, torch.randn(2, 3), cache)["attention_mask"]

    assert lengthened(DynamicCache()) is None
    # Without a cache, transformers takes position ids that stand still for the start of another sequence.
    assert lengthened(None).tolist() == [[1] * 8]


def seen(mask: Tensor) -> list[list[list[int]]]:
    """By row and query: the slots it sees."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    return [[query.nonzero()[:, 0].tolist() for query in row] for row in visible[:, 0]]


@pytest.mark.parametrize("added", [False, True])
def test_a_mask_of_four_dimensions(added: bool) -> None:
    given = causal()
    given[..., 1, 2:4] = True  # an image that sees itself
    given[..., 5, 0] = False
    if added:
        given = torch.zeros(given.shape).masked_fill(~given, torch.finfo().min)
    turn = Turn()
    found = turn.lengthened(attention_mask=given)["attention_mask"]
    assert found.dtype == given.dtype and found.shape == (2, 1, 8, 8)
    slots = seen(found)
    assert slots[0] == [
        [0],
        [0, 1, 2, 3],  # not the context tokens, which are after it
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],  # what context tokens see is cut down to their image elsewhere
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6, 7],
    ]
    assert [[slot - 2 for slot in query] for query in slots[1][2:]] == seen(given)[0]
    # A decode step: the last token sees what it saw, and the context tokens with their image.
    step = causal(7)[:, :, -1:]
    step[..., 3] = False
    if added:
        step = torch.zeros(step.shape).masked_fill(~step, torch.finfo().min)
    assert seen(turn.decoded(step)) == [[[0, 1, 2, 6, 7, 8]], [[2, 3, 4, 6, 7, 8]]]


def test_a_mask_for_every_kind_of_layer() -> None:
    position = torch.arange(6)
    window = causal() & (position > position[:, None] - 2)
    found = Turn().lengthened(attention_mask={"full_attention": causal(), "sliding_attention": window})[
        "attention_mask"
    ]
    assert set(found) == {"full_attention", "sliding_attention"}
    assert seen(found["full_attention"])[0] == [list(range(i + 1)) for i in range(8)]
    # In the window of token 4 are token 3 and what stands in its place; in that of token 5 only token 4.
    assert seen(found["sliding_attention"])[0][-2:] == [[3, 4, 5, 6], [6, 7]]


def test_no_mask_for_a_kind_of_layer() -> None:
    found = Turn(cached=True).lengthened(attention_mask={"full_attention": None})["attention_mask"]["full_attention"]
    assert seen(found)[0] == [list(range(i + 1)) for i in range(8)]
    assert seen(found)[1][2:] == [list(range(2, i + 1)) for i in range(2, 8)]


def test_a_decode_step_in_a_sliding_window() -> None:
    turn = Turn()
    window = WindowLayer(turn.state, 3)
    turn.state.finish(completed=True)
    window.cumulative_length = 8
    # The prompt's last tokens: as many as a window of three holds after it, and the slots that were inserted.
    window.keys = torch.zeros(2, 1, 4, 1)
    assert window.get_seq_length() == 6 and window.get_mask_sizes(1) == (3, 4)
    turn.state.begin([], 2, 1)
    assert window.get_seq_length() == 8 and window.get_mask_sizes(1) == (5, 4)
    cache = DynamicCache()
    cache.layers[:] = [window]
    given = {"sliding_attention": torch.ones(1, 1, 1, 3, dtype=torch.bool)}
    call = {"inputs_embeds": turn.hidden[:, :1], "attention_mask": given}
    found = lengthen(call, turn.state, None, turn.embeddings, cache)["attention_mask"]["sliding_attention"]
    # Slots 4 to 8: in the first row two context tokens of token 3, which has left the window, and tokens 4 to 6.
    assert seen(found) == [[[2, 3, 4]], [[2, 3, 4]]]


def test_shorten() -> None:
    insertion = Turn().insertion
    hidden, cache = torch.randn(2, 8, 3), DynamicCache()
    expected = torch.stack([hidden[0, [0, 1, 2, 3, 6, 7]], hidden[1, 2:]])
    output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=(hidden, hidden))
    short = shorten(output, insertion)
    assert isinstance(short, BaseModelOutputWithPast) and short.past_key_values is cache
    assert torch.equal(short.last_hidden_state, expected) and torch.equal(short["last_hidden_state"], expected)
    assert isinstance(short.hidden_states, tuple) and all(torch.equal(x, expected) for x in short.hidden_states)
    stacked = shorten({"hidden_states": (torch.stack([hidden, -hidden]), hidden)}, insertion)["hidden_states"]
    assert torch.equal(stacked[0], torch.stack([expected, -expected])) and torch.equal(stacked[1], expected)
    weights = torch.randn(2, 4, 8, 8)
    assert shorten([hidden, weights, None], insertion)[1] is weights
    assert torch.equal(shorten((hidden,), insertion)[0], expected)
