"""A forward of the text decoder starts: find the visual tokens, and decide which queries gaze."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticState
from gazepatch.errors import CacheError
from gazepatch.insertion import Insertion, insert
from gazepatch.layout import Span
from gazepatch.running.capture import MODALITIES
from gazepatch.running.forward import Forward
from gazepatch.running.runtime import Runtime

logger = logging.getLogger("gazepatch")


def start_step(runtime: Runtime, state: StaticState, cache: Cache, rows: int) -> Forward:
    """A decode step on a static cache starts. No Python value here may differ from one step to the next."""
    state.step()
    forward = runtime.running.forward = Forward(state, cache, -1, 1)
    if not runtime.adapter.across:
        runtime.record_step(forward, rows)
    return forward


def start(runtime: Runtime, state: GazeState, cache: Cache | None, rows: int, tokens: int) -> Forward:
    """Any other forward of `tokens` tokens in each of `rows` rows starts."""
    past, across = state.length, runtime.adapter.across
    prompt = tokens > 1 or past == 0
    ids = _ids(runtime, rows, tokens, state.tokens) if prompt and not across else None
    captured, runtime.running.captured = runtime.running.captured, {}
    # Behind a prompt, tokens of images that come without any are guesses of assisted generation, embedded as words.
    guessed = past > 0 and not captured and not runtime.running.encoded
    spans = [] if ids is None or guessed else runtime.adapter.locate(runtime.model_config, ids, captured)
    text = _text(runtime, ids, spans) if ids is not None and runtime.config.prefill == "gaze" else None
    insertion = insert(spans, rows, tokens, runtime.config.context_tokens)
    if insertion is not None:
        _check_whole(spans, state)
        spans, tokens = insertion.moved(spans), insertion.source.shape[1]
    spans = [replace(span, start=span.start + past, stop=span.stop + past) for span in spans]
    state.begin(spans, rows, tokens, insertion)
    forward = Forward(state, cache, past, tokens, insertion)
    if not across:
        runtime.record(forward, rows, prompt)
    if text is not None and state.regions is not None:
        forward.routed, forward.routed_rows = _routed(text, insertion, past, state)
    return forward


def _check_whole(spans: Sequence[Span], state: GazeState) -> None:
    """Refuse the rest of an image that was cut: its first part has context tokens behind it already."""
    goes_on = state.length > 0 and any(span.start == 0 for span in spans)
    if goes_on and state.slots.last_context() == state.length - 1:
        raise CacheError(
            "an image goes on that the forward before this one began, and context tokens stand behind whole images: "
            "generate without prefill_chunk_size, or let chunks end between images"
        )


def _ids(runtime: Runtime, rows: int, tokens: int, past: int) -> list[list[int]] | None:
    """Token ids of the new tokens behind `past` others, -1 for padding."""
    ids, mask = runtime.running.ids, runtime.running.mask
    if ids is None or tuple(ids.shape) != (rows, tokens):
        if tokens > 1 and not runtime.warned:
            runtime.warned = True
            found = "without input_ids" if ids is None else f"with {tokens} tokens for input_ids {tuple(ids.shape)}"
            logger.warning(
                "gazepatch: the model was called %s, so its images cannot be found and this prompt is read whole", found
            )
        return None
    if mask is not None and mask.shape[1] >= tokens:
        stop = min(mask.shape[1], past + tokens)  # it may cover all the room of a static cache
        ids = torch.where(mask[:, stop - tokens : stop].to(ids.device) == 0, -1, ids)
    listed: list[list[int]] = ids.tolist()
    return listed


def _text(runtime: Runtime, ids: list[list[int]], spans: Sequence[Span]) -> Tensor:
    """`[B, S]` which tokens are text: not those inside an image (break tokens, newlines)."""
    media = {i for modality in MODALITIES for i in runtime.adapter.token_ids(runtime.model_config, modality)}
    text = torch.tensor([[i not in media and i >= 0 for i in row] for row in ids])
    for span in spans:
        text[span.row, span.start : span.stop] = False
    return text


def _routed(
    text: Tensor, insertion: Insertion | None, past: int, state: GazeState
) -> tuple[Tensor | None, Tensor | None]:
    """Columns and rows of text queries behind a whole span."""
    if insertion is not None:
        text = torch.zeros_like(insertion.source, dtype=torch.bool).scatter(1, insertion.slots, text)
    assert state.regions is not None
    stop = state.regions.stop.masked_fill(state.regions.length == 0, torch.iinfo(torch.long).max)
    text = text & (torch.arange(past, past + text.shape[1]) >= stop.amin(-1, keepdim=True))
    columns = text.any(0).nonzero()[:, 0]
    return (columns, text[:, columns]) if len(columns) else (None, None)
