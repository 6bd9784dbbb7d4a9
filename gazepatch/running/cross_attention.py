"""A forward as cross-attention layers see it, whose keys are images and no tokens of the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gazepatch.caches.adoption import state_of_images
from gazepatch.caches.cross_attention import CrossState, StaticCrossState, new_keys
from gazepatch.running.forward import Forward
from gazepatch.running.runtime import Runtime


def start_cross_attention(runtime: Runtime, text: Forward, call: Mapping[str, Any], rows: int) -> Forward:
    """The other side of the forward `text`, which has started: all keys come before it, a mask says who sees them.

    Args:
        runtime: Of the patched model.
        text: The forward as the layers of the sequence see it.
        call: Arguments of the decoder.
        rows: Rows of the batch.
    """
    state, adapter = _state(runtime, text), runtime.adapter
    prompt = text.tokens > 1 or text.past == 0 or isinstance(state, StaticCrossState)
    keys, spans = new_keys(adapter, runtime.model_config, call, rows)
    last_row, runtime.running.last_row = runtime.running.last_row, None  # of this forward alone
    others = state.look(spans, rows, keys, call.get(adapter.cross_mask), not prompt, None if prompt else last_row)
    forward = Forward(state, text.cache, state.length + keys, text.tokens)
    runtime.record(forward, rows, prompt, others)
    if prompt and runtime.config.prefill == "gaze" and state.regions is not None:
        forward.routed = torch.arange(text.tokens)
        forward.routed_rows = torch.ones(rows, text.tokens, dtype=torch.bool)
    return forward


def step_cross_attention(runtime: Runtime, text: Forward, call: Mapping[str, Any], rows: int) -> Forward:
    """As `start_cross_attention`, of a step on a static cache."""
    state, running = _state(runtime, text), runtime.running
    assert isinstance(state, StaticCrossState)
    last_row, running.last_row = running.last_row, None
    others = state.look_again(call.get(runtime.adapter.cross_mask), last_row)
    state.step()
    forward = Forward(state, text.cache, -1, 1)
    runtime.record_step(forward, rows, others)
    return forward


def _state(runtime: Runtime, text: Forward) -> CrossState:
    return state_of_images(text.cache, runtime, runtime.config, runtime.layers.left, runtime.gaze_layers)
