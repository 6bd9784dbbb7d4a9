"""Layers with short convolutions beside their keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import Case, batch, tiny
from transformers import DynamicCache

from gazepatch.caches.hybrid import HybridLayer
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.patch import patched

WHOLE = GazeConfig(region=(3, 3, 1), window=(1, 3, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = dataclasses.replace(WHOLE, budget=0.25)


@pytest.fixture(params=["inkling2", "inkling_mm_model"])
def hybrid(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12},
    ],
    ids=str,
)
@torch.no_grad()
def test_convolutions_go_along_with_the_keys(hybrid: Case, settings: dict) -> None:
    given = hybrid if "prompt_lookup_num_tokens" in settings else batch(hybrid)
    settings = {"max_new_tokens": 8, **settings}
    torch.manual_seed(0)
    dense = given.model.generate(**given.inputs, **settings)
    with patched(given.model, WHOLE):
        torch.manual_seed(0)
        assert torch.equal(given.model.generate(**given.inputs, **settings), dense)


@torch.no_grad()
def test_hybrid_layers_are_reset_and_not_offloaded(hybrid: Case) -> None:
    cache = DynamicCache(config=hybrid.model.config)
    with patched(hybrid.model, QUARTER):
        first = hybrid.model(**hybrid.inputs, past_key_values=cache).logits
        assert isinstance(cache.layers[1], HybridLayer) and cache.get_seq_length() == first.shape[1]
        with pytest.raises(CacheError, match="cannot be offloaded"):
            cache.layers[1].offload()
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.crop(-1)
        for chosen, rows in ([0, 0, 0], 3), ([True, False, True], 2):
            cache.layers[1].batch_select_indices(torch.tensor(chosen))
            assert {len(x) for x in cache.layers[1].conv_states.values()} == {rows} == {len(cache.layers[1].keys)}
        cache.layers[1].reset()
        assert cache.layers[1].get_seq_length() == 0 and cache.gaze.length == 0
        assert not any(cache.layers[1].has_previous_state.values())
        assert not any(x.any() for x in cache.layers[1].conv_states.values())
