"""A forward as cross-attention layers see it, whose keys are images and no tokens of the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gazepatch.caches.crossing import new_keys, state_of_images
from gazepatch.running.forward import Forward
from gazepatch.running.runtime import Runtime


def start_across(runtime: Runtime, text: Forward, call: Mapping[str, Any], rows: int) -> Forward:
    """The other side of the forward `text`, which has started: all keys come before it, a mask says who sees them.

    Args:
        runtime: Of the patched model.
        text: The forward as the layers of the sequence see it.
        call: Arguments of the decoder.
        rows: Rows of the batch.
    """
    prompt, adapter = text.tokens > 1 or text.past == 0, runtime.adapter
    state = state_of_images(text.cache, runtime, runtime.config, runtime.layers.left, runtime.gaze_layers)
    keys, spans = new_keys(adapter, runtime.model_config, call, rows)
    last_row, runtime.running.last_row = runtime.running.last_row, None  # of this forward alone
    others = state.look(spans, rows, keys, call.get(adapter.cross_mask), not prompt, None if prompt else last_row)
    forward = Forward(state, text.cache, state.length + keys, text.tokens)
    runtime.record(forward, rows, prompt, others)
    if prompt and runtime.config.prefill == "gaze" and state.regions is not None:
        forward.routed = torch.arange(text.tokens)
        forward.routed_rows = torch.ones(rows, text.tokens, dtype=torch.bool)
    return forward
