"""A call of the text decoder with context tokens spliced in, and its output with them cut out again.

Everything that has one entry a token is spread over the slots: embeddings, positions, masks of two and four
dimensions, and whatever else a family hands its decoder in that shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticState
from gazepatch.caches.window import WindowLayer
from gazepatch.errors import UnsupportedModelError
from gazepatch.insertion import Insertion

#: Arguments that are spread in a way of their own.
OWN_WAY = ("inputs_embeds", "input_ids", "attention_mask", "position_ids", "cache_position")


def lengthen(
    call: Mapping[str, Any], state: GazeState, insertion: Insertion | None, embeddings: Tensor, cache: Cache | None
) -> dict[str, Any]:
    """The arguments of a decoder call, by slot instead of by position.

    Args:
        call: The arguments as the model made them, S tokens a row.
        state: Of the sequence; this forward has begun in it.
        insertion: Where context tokens come in, or None when none do in this forward.
        embeddings: `[M, hidden]` of the context tokens.
        cache: As the decoder gets it.

    Raises:
        UnsupportedModelError: The decoder embeds its tokens itself.
    """
    changed = dict(call)
    hidden = call.get("inputs_embeds")
    if hidden is None:
        raise UnsupportedModelError(
            "context tokens need a text decoder that is called with inputs_embeds, got input_ids: "
            "patch this model with context_tokens=0"
        )
    tokens, past = hidden.shape[1], state.length
    at = insertion.to(hidden.device) if insertion is not None else None
    positions = call.get("position_ids")
    if positions is None:
        before = past - state.slots.inserted + (0 if insertion is None else insertion.inserted)
        positions = torch.arange(before, before + tokens, device=hidden.device)[None]
    if at is not None:
        changed["inputs_embeds"] = _embedded(hidden, at, embeddings)
        positions = _spread_last(positions, at)
        for name in call.keys() - set(OWN_WAY):
            if torch.is_tensor(call[name]) and call[name].shape[:2] == hidden.shape[:2]:
                changed[name] = _spread(call[name], at)
    changed["position_ids"] = positions
    if call.get("cache_position") is not None:
        changed["cache_position"] = torch.arange(past, past + state.new_tokens, device=hidden.device)
    changed["attention_mask"] = _masks(call.get("attention_mask"), state, at, cache, hidden)
    return changed


def lengthen_step(call: Mapping[str, Any], state: StaticState, hidden: Tensor) -> dict[str, Any]:
    """The arguments of a decode step on a static cache, by slot: no context token is new, but masks have them all."""
    assert state.filled is not None
    changed = dict(call)
    if call.get("position_ids") is None:
        changed["position_ids"] = (state.filled.to(hidden.device) - state.slots.inserted).view(1, 1)
    if call.get("cache_position") is not None:
        changed["cache_position"] = state.filled.to(hidden.device).view(1)
    given = call.get("attention_mask")
    if isinstance(given, Mapping):
        changed["attention_mask"] = {kind: _step_mask(mask, state, hidden) for kind, mask in given.items()}
    else:
        changed["attention_mask"] = _step_mask(given, state, hidden)
    return changed


def _step_mask(given: Tensor | None, state: StaticState, hidden: Tensor) -> Tensor | None:
    """`[..., room]` out of a mask of the tokens so far, or of all there is room for."""
    if given is None and not state.slots.padded:
        return None
    if given is None:
        given = torch.ones(len(hidden), state.capacity, dtype=torch.bool, device=hidden.device)
    if given.shape[-1] < state.capacity:
        given = torch.nn.functional.pad(given, (0, state.capacity - given.shape[-1]), value=1)
    position: Tensor = state.table("slot_positions", given.device)
    hides = False if given.dtype == torch.bool else torch.finfo(given.dtype).min if given.is_floating_point() else 0
    position = position.view(len(position), *[1] * (given.dim() - 2), -1).expand(*given.shape[:-1], -1)
    return given.gather(-1, position.clamp(min=0)).masked_fill(position < 0, hides)


def shorten(output: Any, insertion: Insertion, name: str = "") -> Any:
    """The decoder's output, or its part of this name, by position again: every tensor in it with one entry a slot."""
    slots, shape = insertion.slots, insertion.source.shape
    if torch.is_tensor(output):
        # Gemma 3n has several states of every token, stacked in front.
        stacked = name == "hidden_states" and output.dim() == 4
        if output.shape[stacked : stacked + 2] != shape:
            return output
        rows = torch.arange(len(slots), device=output.device)[:, None]
        return output[(slice(None),) * stacked + (rows, slots.to(output.device))]
    if isinstance(output, Cache):
        return output
    if isinstance(output, Mapping):  # a ModelOutput, whose entries are attributes as well
        for name in list(output):
            output[name] = shorten(output[name], insertion, name)  # type: ignore[index]
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(shorten(part, insertion, name) for part in output)
    return output


def _embedded(hidden: Tensor, at: Insertion, embeddings: Tensor) -> Tensor:
    """`[B, S', hidden]`: context tokens in their slots, zeros in padding."""
    spread = _spread(hidden, at)
    context = embeddings.to(hidden)[at.context.clamp(min=0)]
    return torch.where((at.context >= 0)[..., None], context, spread)


def _spread(x: Tensor, at: Insertion) -> Tensor:
    """`[B, S, ...]` gives `[B, S', ...]`, zeros where no token is."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    spread = x[rows, at.source.clamp(min=0).to(x.device)]
    nothing = ((at.source < 0) | (at.context >= 0)).to(x.device)
    return spread.masked_fill(nothing.view(*nothing.shape, *[1] * (x.dim() - 2)), 0)


def _spread_last(positions: Tensor, at: Insertion) -> Tensor:
    """`[..., b, S]` position ids give `[..., B, S']`; context tokens have those of the last token of their image."""
    source = at.source.clamp(min=0).to(positions.device)
    shape = (*positions.shape[:-2], len(source), positions.shape[-1])
    return positions.expand(shape).gather(-1, source.expand(*shape[:-1], -1))


def _masks(given: Any, state: GazeState, at: Insertion | None, cache: Cache | None, hidden: Tensor) -> Any:
    """Masks in any form a decoder takes: none, of padding, of four dimensions, or one of these a kind of layer."""
    if isinstance(given, Mapping):
        return {kind: _mask(mask, state, at, cache, hidden, "sliding" in kind) for kind, mask in given.items()}
    if given is None or (torch.is_tensor(given) and given.dim() == 2):
        return _padding(given, state, cache, hidden)
    return _mask(given, state, at, cache, hidden, False)


def _padding(given: Tensor | None, state: GazeState, cache: Cache | None, hidden: Tensor) -> Tensor | None:
    """`[B, L]` over slots. None if there is nothing to hide and a cache: without one, None means packed sequences."""
    if given is None and cache is not None and not state.slots.padded:
        return None
    rows, inserted = len(hidden), state.slots.inserted
    if given is None:
        length = state.length + state.new_tokens - inserted
        given = torch.ones(rows, length, dtype=torch.long, device=hidden.device)
    source, _ = state.table("recorded", given.device)
    recorded = given.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
    return torch.cat([recorded, given[:, source.shape[1] - inserted :]], 1)


def _mask(
    given: Tensor | None, state: GazeState, at: Insertion | None, cache: Cache | None, hidden: Tensor, sliding: bool
) -> Tensor | None:
    """`[B, 1, S', L']` out of `[b, 1, S, L]`: rows and columns follow their tokens.

    A context token is visible where the last token of its image is, but only to slots after it.
    """
    total = state.length + state.new_tokens
    if given is None:
        if not state.slots.padded:
            return None  # plain causal, of slots as of positions
        given, sliding = _causal(total - state.slots.inserted, hidden.shape[1], hidden.device), False
    given = given[..., : total - state.slots.inserted]  # those of a static cache go on to where its room ends
    held, queries = _key_slots(cache, state, sliding), state.new_tokens
    position, context = (table[:, total - held :] for table in state.every_slot(given.device))
    column = position - (total - state.slots.inserted - given.shape[3])
    slot = torch.arange(total - held, total, device=given.device)
    hidden_from = (column < 0)[:, None] | (context[:, None] & (slot > slot[-queries:, None]))
    mask = given.expand(len(hidden), -1, -1, -1)
    if at is not None:
        mask = mask.take_along_dim(at.source.clamp(min=0).to(given.device)[:, None, :, None], 2)
    mask = mask.take_along_dim(column.clamp(min=0)[:, None, None], 3)
    return mask.masked_fill(hidden_from[:, None], False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _causal(total: int, queries: int, device: torch.device) -> Tensor:
    position = torch.arange(total, device=device)
    return (position <= position[total - queries :, None])[None, None]


def _key_slots(cache: Cache | None, state: GazeState, sliding: bool) -> int:
    """Keys that layers of a kind attend to in this forward."""
    if cache is None:
        return state.new_tokens
    if sliding:
        windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        return windows[0].get_mask_sizes(state.new_tokens)[0]
    return state.length + state.new_tokens
