"""A forward of the text decoder starts: its cache learns of it, and queries of a prompt are told which gaze."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticState
from gazepatch.insertion import Insertion, insert
from gazepatch.running.forward import Forward
from gazepatch.running.locating import located
from gazepatch.running.runtime import Runtime


def start_step(runtime: Runtime, state: StaticState, cache: Cache, rows: int) -> Forward:
    """A decode step on a static cache starts. No Python value here may differ from one step to the next."""
    state.step()
    forward = runtime.running.forward = Forward(state, cache, -1, 1)
    if not runtime.adapter.cross_attention:
        runtime.record_step(forward, rows)
    return forward


def start(runtime: Runtime, state: GazeState, cache: Cache | None, rows: int, tokens: int) -> Forward:
    """Any other forward of `tokens` tokens in each of `rows` rows starts."""
    past, cross_attention = state.length, runtime.adapter.cross_attention
    prompt = tokens > 1 or past == 0 or state.partial_prompt is not None or runtime.running.prefill is not None
    captured, runtime.running.captured = runtime.running.captured, {}
    spans, text = located(runtime, state, rows, tokens, captured) if prompt and not cross_attention else ([], None)
    insertion = insert(spans, rows, tokens, runtime.config.context_tokens)
    if insertion is not None:
        spans, tokens = insertion.moved(spans), insertion.source.shape[1]
    spans = [replace(span, start=span.start + past, stop=span.stop + past) for span in spans]
    state.begin(spans, rows, tokens, insertion, prompt)
    forward = Forward(state, cache, past, tokens, insertion)
    if not cross_attention:
        runtime.record(forward, rows, prompt)
        forward.plain = not (prompt or state.decoding or state.slots.inserted or forward.trace is not None)
    if text is not None and state.regions is not None:
        forward.routed, forward.routed_rows = _routed(text, insertion, past, state)
    return forward


def _routed(
    text: Tensor, insertion: Insertion | None, past: int, state: GazeState
) -> tuple[Tensor | None, Tensor | None]:
    """Columns and rows of text queries after a whole span."""
    if insertion is not None:
        text = torch.zeros_like(insertion.source, dtype=torch.bool).scatter(1, insertion.slots, text)
    assert state.regions is not None
    stop = state.regions.stop.masked_fill(state.regions.length == 0, torch.iinfo(torch.long).max)
    text = text & (torch.arange(past, past + text.shape[1]) >= stop.amin(-1, keepdim=True))
    columns = text.any(0).nonzero()[:, 0]
    return (columns, text[:, columns]) if len(columns) else (None, None)
