"""Queries of a prompt that do not see what the model's own attention lets them: they are done again after it.

Those of context tokens see their own image alone, and those of text read a few regions where prompts gaze.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gazepatch.caches.latents import Expansion
from gazepatch.counters import PromptReads, QueryReads
from gazepatch.insertion import OwnImage
from gazepatch.ops.prefill import Keys, Queries, gaze_prefill
from gazepatch.running.call import Call, implementation
from gazepatch.running.forward import Forward
from gazepatch.running.masks import as_4d, of_queries
from gazepatch.score_mod import ScoreMod, visible


def see_own_image(call: Call, own: OwnImage, original: str, dense: Tensor) -> Tensor:
    """`dense` with the queries of context tokens done again, over the keys of their own image alone.

    Args:
        call: Of the layer.
        own: Which queries these are, and what they see.
        original: Name of the implementation that the model has.
        dense: `[B, S, H, D_v]` what that made of all queries.
    """
    shown, new = own.visible, call.query.shape[2]
    if torch.is_tensor(call.mask) and call.mask.dim() == 4:  # a sliding window may hide some of the image
        mask = call.mask[..., -new:].index_select(2, own.columns)
        shown = shown & visible(mask)
    # Flash attention takes no mask, and sdpa no more than dot products.
    more = original != "sdpa" and any(call.options.get(name) is not None for name in ("softcap", "s_aux"))
    name = "eager" if more or original == "eager" else "sdpa"
    query = call.query.index_select(2, own.columns)
    if name == "eager":
        shown = torch.where(shown, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    attend, key, value = implementation(name, call.module), call.key[:, :, -new:], call.value[:, :, -new:]
    output, _ = attend(call.module, query, key, value, shown, **call.options)
    return _replaced(dense, own.columns, own.rows, output)


def gaze(
    call: Call,
    score_mod: ScoreMod,
    forward: Forward,
    store: int,
    dense: Tensor,
    reads: PromptReads | None = None,
) -> Tensor:
    """`dense` with the queries of text that gaze done again.

    Args:
        call: Of the layer.
        score_mod: What becomes of its dot products.
        forward: It has `routed` queries.
        store: Index of the layer of the cache that has the keys.
        dense: `[B, S, H, D_v]` what the model's own attention made of all queries.
        reads: Counts what they read.
    """
    (columns, rows, first), config = _routed(call, forward), forward.state.config
    if not len(columns):
        return dense
    expansion, (key, value) = None, (call.key, call.value)
    if call.latents is not None:  # read as decode steps read them, so that the same regions are selected
        expansion = Expansion.of(call.module.expand_kv, *call.latents)
        key = value = torch.cat(call.latents, 3)
    query, positions = call.query.index_select(2, columns), columns + first
    queries = Queries(
        query if expansion is None else expansion.absorbed(query),
        positions,
        of_queries(as_4d(call.mask), columns, positions, call.query.shape[2], key.shape[2]),
        forward.state.laid(score_mod).of_queries(columns),
        None if reads is None else QueryReads(reads, rows & _among(reads.tokens, forward, positions - forward.past)),
    )
    output = gaze_prefill(queries, _keys(forward, store, key, value, config.periphery), config)
    output = output if expansion is None else expansion.expanded(output)
    return _replaced(dense, columns, rows, output.transpose(1, 2))


def _routed(call: Call, forward: Forward) -> tuple[Tensor, Tensor, int]:
    """Columns of the call whose queries gaze, in which rows, and the slot of the first column."""
    assert forward.routed is not None and forward.routed_rows is not None
    columns, rows = forward.routed.to(call.query.device), forward.routed_rows.to(call.query.device)
    dropped = forward.tokens - call.query.shape[2]  # a layer may do without the queries that no logits are asked for
    if dropped:
        kept = (columns >= dropped).nonzero()[:, 0]
        columns, rows = columns[kept] - dropped, rows[:, kept]
    return columns, rows, forward.past + dropped


def _among(tokens: Tensor, forward: Forward, columns: Tensor) -> Tensor:
    """`[B, Q]` which of the forward's text tokens in these columns are among `tokens` `[B, S]`."""
    tokens = tokens.to(columns.device)
    if forward.insertion is None:
        return tokens[:, columns]
    source = forward.insertion.source.to(columns.device)[:, columns]
    return tokens.gather(1, source.clamp(min=0))


def _keys(forward: Forward, store: int, key: Tensor, value: Tensor, periphery: bool) -> Keys:
    """The keys with their regions; means of the windows as cached, or made here when the forward keeps no cache."""
    state, device = forward.state, key.device
    if forward.cache is not None:
        layer = forward.layer(store)
        assert layer.mean_keys is not None
        means = layer.mean_keys, layer.mean_values
    else:
        chunk = state.table("chunk", device)
        means = chunk.means(chunk.visual_entries(key)), chunk.means(chunk.visual_entries(value)) if periphery else None
    return Keys(key, value, *means, state.table("regions", device), state.table("region_of", device))


def _replaced(dense: Tensor, columns: Tensor, rows: Tensor, output: Tensor) -> Tensor:
    """`dense` `[B, S, H, D_v]` with `output` `[B, Q, H, D_v]` in the columns `[Q]` of the rows `[B, Q]`."""
    kept = dense.index_select(1, columns)
    return dense.index_copy(1, columns, torch.where(rows[..., None, None], output, kept))
