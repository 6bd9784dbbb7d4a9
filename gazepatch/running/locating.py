"""Where the visual tokens of a forward are, also of a prompt that comes in several forwards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gazepatch.caches.state import GazeState, PartialPrompt
from gazepatch.errors import CacheError
from gazepatch.layout import Span
from gazepatch.running.capture import MODALITIES
from gazepatch.running.runtime import FeatureOrigin, Runtime

logger = logging.getLogger("gazepatch")

#: What to do about context tokens, which stand after whole images, one of which may end in any piece of a prompt.
_TOGETHER = (
    "context tokens need all images in one forward, so generate without prefill_chunk_size, or with one that reaches "
    "past the last image"
)


def located(
    runtime: Runtime, state: GazeState, rows: int, tokens: int, captured: Mapping[str, FeatureOrigin]
) -> tuple[list[Span], Tensor | None]:
    """The spans of a forward, by position in it, and where prompts gaze `[B, S]` which of its tokens are text.

    Images are known by their order among all of a prompt. So while some are still to come (`prefill_chunk_size`), the
    others wait, and are read as text is; in the forward that brings the last of them, they have positions below 0.

    Args:
        runtime: Of the model.
        state: Of the cache, in which a prompt waits that was cut.
        rows: B.
        tokens: S.
        captured: By modality, the features that were made for the prompt. Those of which nothing has come are kept for
            the forwards after this one.

    Raises:
        CacheError: The prompt is cut inside its images, and has context tokens.
    """
    waiting, state.partial_prompt, before = state.partial_prompt, None, 0
    if (ids := _ids(runtime, rows, tokens, state.tokens)) is None:
        return [], None
    if waiting is not None:
        before, captured = len(waiting.ids[0]), {**waiting.captured, **captured}
        ids = [[*held, *new] for held, new in zip(waiting.ids, ids, strict=True)]
    brought = bool(captured)
    count = {modality: _count(runtime, modality, ids) for modality in captured}
    runtime.running.captured = {modality: origin for modality, origin in captured.items() if not count[modality]}
    captured = {modality: origin for modality, origin in captured.items() if count[modality]}
    encoded, past = runtime.running.encoded, state.length > 0
    if (prefill := runtime.running.prefill) is not None:
        rest = prefill.rest(state.tokens + tokens).tolist()
        to_come = any(_count(runtime, modality, rest) for modality in captured)
    else:
        # Whoever calls the model may have repeated each row, and the features with it.
        whole = all(not origin.tokens or count[modality] % origin.tokens == 0 for modality, origin in captured.items())
        to_come = not whole and (not past or tokens > 1 or encoded)  # else more than ever will have come
    if to_come:
        if runtime.config.context_tokens:
            raise CacheError(f"images of this prompt are still to come: {_TOGETHER}")
        state.partial_prompt = PartialPrompt(ids, captured)
        return [], None
    # After a prompt, tokens of images that come without any are guesses of assisted generation, embedded as words.
    guessed = past and not brought and not encoded
    calls = {modality: origin.arguments for modality, origin in captured.items()}
    spans = [] if guessed else runtime.adapter.locate(runtime.model_config, ids, calls)
    _check_whole(spans, state)
    text = _text(runtime, ids, spans)[:, before:] if runtime.config.prefill == "gaze" else None
    return [replace(span, start=span.start - before, stop=span.stop - before) for span in spans], text


def _check_whole(spans: Sequence[Span], state: GazeState) -> None:
    """Refuse the rest of an image that was cut: its first part has context tokens after it already."""
    goes_on = state.length > 0 and any(span.start == 0 for span in spans)
    if goes_on and state.slots.last_context() == state.length - 1:
        raise CacheError(f"an image goes on that the forward before this one began: {_TOGETHER}")


def _count(runtime: Runtime, modality: str, ids: list[list[int]]) -> int:
    """Tokens that take features of a modality."""
    return sum(len(runtime.adapter.positions(runtime.model_config, modality, row)) for row in ids)


def _ids(runtime: Runtime, rows: int, tokens: int, past: int) -> list[list[int]] | None:
    """Token ids of the new tokens after `past` others, -1 for padding."""
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
