"""One layer of a gaze cache, and what all share, without a model: growth, memory, the newest entry, padding."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gazepatch.caches.layer import MIN_ROOM, GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.layout import Span

QUARTER = GazeConfig(region=(3, 3, 1), window=(1, 3, 1), budget=0.25, periphery=False, min_visual_tokens=0)


def filled_layer(tokens: int, span: Span) -> tuple[GazeState, GazeLayer, object]:
    owner = type("Owner", (), {})()
    state = GazeState(owner, QUARTER)
    layer = GazeLayer(state, gazes=True, leads=True)
    state.begin([span], 1, tokens)
    layer.update(torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8))
    state.finish(True)
    return state, layer, owner


@torch.no_grad()
def test_decode_steps_append_in_place_and_grow_rarely() -> None:
    state, layer, _owner = filled_layer(50, Span(0, 4, 40, (1, 6, 6), 0))
    stores = set()
    for step in range(3 * MIN_ROOM):
        state.begin([], 1, 1)
        new = torch.full((1, 2, 1, 8), float(step))
        layer.update(new, -new)
        key, value = layer.entries()[:2]
        state.finish(True)
        stores.add(key.untyped_storage().data_ptr())
        assert key.shape[2] == 14 + step + 1
        assert torch.equal(key[:, :, -1:], new) and torch.equal(value[:, :, -1:], -new)
    assert len(stores) <= 4
    assert torch.equal(layer.logical()[0][:, :, 50:, 0], torch.arange(3 * MIN_ROOM).expand(1, 2, -1).float())


def test_an_entry_that_nobody_attended_to_is_not_lost() -> None:
    state, layer, _owner = filled_layer(50, Span(0, 4, 40, (1, 6, 6), 0))
    for step in range(4):
        state.begin([], 1, 1)
        layer.update(torch.full((1, 2, 1, 8), float(step)), torch.full((1, 2, 1, 8), -float(step)))
        if step == 1:
            layer.batch_select_indices(torch.tensor([0]))
        if step == 2:
            assert torch.equal(layer.logical()[0][0, 0, 50:, 0], torch.arange(3.0))
        state.finish(True)
    pending = layer.take_pending()
    assert pending is not None and layer.take_pending() is None
    assert layer.keys[0, 0, 50:53, 0].tolist() == [0, 1, 2]
    pending.write()  # by whoever took it
    assert layer.keys[0, 0, 50:, 0].tolist() == [0, 1, 2, 3] and layer.values[0, 1, -1, 7] == -3


def test_memory_is_close_to_that_of_the_entries() -> None:
    tokens = 64 * 64 + 100
    state, layer, _owner = filled_layer(tokens, Span(0, 50, 50 + 64 * 64, (1, 64, 64), 0))
    state.begin([], 1, 1)
    layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert layer.nbytes() <= 1.25 * 2 * (tokens + 1) * 2 * 8 * 4


class NothingSent(TorchDispatchMode):
    """Fails where numbers of the host are sent to the device, which it waits for."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        assert operator is not torch.ops.aten._to_copy.default or args[0].device == made.device
        return made


def test_padding_is_sent_to_the_device_once() -> None:
    device, mask = torch.device("meta"), torch.ones(2, 1, 1, 100, dtype=torch.bool, device="meta")
    state = GazeState(torch.nn.Module(), QUARTER)
    state.begin([Span(0, 3, 43, (1, 5, 8), 0)], 2, 50)  # the second row has no image, so it has more other entries
    state.finish(True)
    for step, context in enumerate((nullcontext(), NothingSent(), NothingSent()), 1):
        with context:
            state.begin([], 2, 1)
            bias, alone = (state.bias(given, device) for given in (mask, None))
            assert bias is not None and alone is not None and bias.shape == alone.shape == (2, 1, 1, 50 + step)
            state.finish(True)
    state.crop(5)
    state.begin([], 2, 1)
    cropped = state.bias(mask, device)
    assert cropped is not None and cropped.shape[3] == 53 - 5 + 1
