"""The kernels as operators of torch: `torch.ops.gazepatch.select`, `decode` and `window_means`.

torch.compile takes each as one node. They allocate nothing that depends on data and never wait for the device: a step
can be captured in a CUDA graph. What they need between launches is handed in (`gazepatch.kernels.plan`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gazepatch.kernels.device.decode import decode_kernel
from gazepatch.kernels.device.means import means_kernel
from gazepatch.kernels.device.selection import select_kernel
from gazepatch.kernels.launch import Launch
from gazepatch.kernels.library import fake, operator
from gazepatch.kernels.settings import architecture, decode_settings, on, padded, power, row_stride, select_settings


def select_launch(
    query: Tensor,
    mean_keys: Tensor,
    log_counts: Tensor,
    table: Tensor,
    budget: Tensor,
    logits: Tensor,
    weights: Tensor,
    tile_max_and_sum: Tensor,
    runs: Tensor,
    taken: Tensor,
    total: Tensor | None,
    arrived: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    new_key: Tensor | None,
    new_value: Tensor | None,
    filled: Tensor | None,
    offset: int,
    scale: float,
    softcap: float | None,
    by_max: bool,
    periphery: bool,
    splits: int,
) -> Launch:
    """The launch that selects regions, like `gazepatch.selection`, and appends an entry, like `gazepatch.ops.pending`.

    Args:
        query: `[B, H, D]`.
        mean_keys: `[B, H_kv, R * C, D]`, any strides.
        log_counts: `[b, R * C]` float32; `b` is 1 or B, here and below.
        table: `[b, R, 2]` int32, contiguous: first slot and tokens of the regions.
        budget: `[b]` int32, regions that a query of the row reads.
        logits: Out, `[B, H, R * C]` float32: of the windows; written with `periphery`.
        weights: Out, `[B, H, padded_regions(R)]` float32.
        tile_max_and_sum: Out, `[B, H, most_tiles(R, C), 2]` float32.
        runs: Out, `[B, H_kv, g, S, 2]` int32: start and length of the selected regions by their number, zeros after
            them. With `g` = G every query head selects for itself.
        taken: Out, `[B, H_kv, g, R]` int8: which regions are selected; written with `periphery`.
        total: `[1]` int64, the tokens of the selected regions are added to it; None: they are not counted.
        arrived: `[B * H_kv]` int32 zeros, and zeros again afterwards.
        key, value: Stores `[B, H_kv, T, D]` and `[B, H_kv, T, D_v]`, contiguous, to append to; the second or both may
            be None.
        new_key, new_value: `[B, H_kv, 1, D]` and `[B, H_kv, 1, D_v]`, for these.
        filled, offset: An int64 number on the device, or None for 0, and one to be added: the slot to write to.
        scale, softcap: Of the attention scores, as in `gazepatch.score_mod`.
        by_max: Heads agree by the maximum of their shares, not their mean.
        periphery: Whether `logits` and `taken` are written.
        splits: Programs a (row, key head) pair.
    """
    batch, heads, dim = query.shape
    key_heads, regions = mean_keys.shape[1], table.shape[1]
    group, windows = heads // key_heads, log_counts.shape[1] // max(regions, 1)
    settings = select_settings(architecture(query.device), group, windows, regions, dim, query.element_size(), splits)
    new_key, new_value = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (new_key, new_value))
    value_dim = 0 if value is None else value.shape[3]
    arguments = (
        query,
        mean_keys,
        log_counts,
        table.view(torch.int64),
        budget,
        logits,
        weights,
        tile_max_and_sum,
        runs.view(torch.int64),
        taken,
        total,
        arrived,
        key,
        value,
        new_key,
        new_value,
        filled,
        offset,
        scale,
        1.0 if softcap is None else softcap,
        regions,
        weights.shape[2],
        tile_max_and_sum.shape[2],
        runs.shape[3],
        query.stride(0),
        query.stride(1),
        *mean_keys.stride(),
        row_stride(log_counts),
        row_stride(table) // 2,
        row_stride(budget),
        0 if key is None else key.shape[2],
        *((0, 0) if new_key is None else new_key.stride()[:2]),
        *((0, 0) if new_value is None else new_value.stride()[:2]),
    )
    constants = dict(
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        WINDOWS=windows,
        PER_HEAD=runs.shape[2] > 1,
        BY_MAX=by_max,
        PERIPHERY=periphery,
        COUNTS=total is not None,
        CAPPED=softcap is not None,
        APPENDS=key is not None,
        BLOCK_V=padded(value_dim),
        **settings,
    )
    return Launch(select_kernel, (splits, key_heads, batch), arguments, constants)


@operator(
    "select(Tensor query, Tensor mean_keys, Tensor log_counts, Tensor table, Tensor budget, "
    "Tensor(a!) logits, Tensor(b!) weights, Tensor(c!) tile_max_and_sum, Tensor(d!) runs, Tensor(e!) taken, "
    "Tensor(f!)? total, Tensor(g!) arrived, Tensor(h!)? key, Tensor(i!)? value, Tensor? new_key, Tensor? new_value, "
    "Tensor? filled, int offset, float scale, float? softcap, bool by_max, bool periphery, int splits) -> ()",
)
def select(*arguments: Any) -> None:
    """What `selection` launches."""
    select_launch(*arguments).run(arguments[0].device)


@fake("select")
def _(*_: object) -> None:
    return None


def decode_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    visual_key: Tensor,
    visual_value: Tensor,
    runs: Tensor,
    logits: Tensor | None,
    taken: Tensor | None,
    mean_values: Tensor | None,
    sinks: Tensor | None,
    partial: Tensor,
    max_and_sum: Tensor,
    arrived: Tensor,
    scale: float,
    softcap: float | None,
    longest: int,
    splits: int,
    *,
    output: Tensor,
) -> Launch:
    """The launch for attention of one query token a row, like `gazepatch.ops.decode.gaze_decode`.

    Args:
        query: `[B, H, D]`.
        key, value: `[B, H_kv, T, D]` and `[B, H_kv, T, D_v]`, every entry that is always visible.
        bias: `[b, T]` float32, added to the scores of these.
        visual_key, visual_value: `[B, H_kv, N, D]` and `[B, H_kv, N, D_v]`, rows of the store dense.
        runs: `[B, H_kv, g, S, 2]` int32: first slot and tokens of what is read of it.
        logits, taken, mean_values: For the periphery: what `select` wrote, and `[B, H_kv, R * C, D_v]`; or None.
        sinks: `[b, H]`, scores of one more key, whose value is zero; or None.
        partial, max_and_sum: Scratch float32 of at least `[B * H_kv * g, splits, G / g, D_v]` and `[..., 2]`.
        arrived: `[B * H_kv * g]` int32 zeros, and zeros again afterwards.
        scale, softcap: Of the attention scores, as in `gazepatch.score_mod`.
        longest: Tokens of the longest region.
        splits: Programs a selection.
        output: Out, `[B, H, D_v]`.
    """
    batch, heads, dim = query.shape
    key_heads, value_dim = key.shape[1], value.shape[3]
    selections, places = runs.shape[2], runs.shape[3]
    rows = heads // key_heads // selections
    periphery = logits is not None and taken is not None and mean_values is not None
    kind = architecture(query.device)
    settings = decode_settings(kind, rows, dim, value_dim, query.element_size(), longest)
    arguments = (
        query,
        key,
        value,
        bias,
        visual_key,
        visual_value,
        runs.view(torch.int64),
        logits,
        taken,
        mean_values,
        sinks,
        partial,
        max_and_sum,
        arrived,
        output,
        scale,
        1.0 if softcap is None else softcap,
        key.shape[2],
        places,
        longest,
        logits.shape[2] if logits is not None else 0,
        query.stride(0),
        query.stride(1),
        *key.stride()[:3],
        *value.stride()[:3],
        0 if bias is None else row_stride(bias),
        *visual_key.stride()[:2],
        *visual_value.stride()[:2],
        *((0, 0) if mean_values is None else mean_values.stride()[:2]),
        *((0, 0) if sinks is None else (row_stride(sinks), sinks.stride(1))),
    )
    constants = dict(
        SELECTIONS=selections,
        ROWS=rows,
        DIM=dim,
        VALUE_DIM=value_dim,
        WINDOWS=logits.shape[2] // taken.shape[3] if logits is not None and taken is not None else 1,
        HAS_BIAS=bias is not None,
        HAS_RUNS=places > 0,
        PERIPHERY=periphery,
        HAS_SINKS=sinks is not None,
        CAPPED=softcap is not None,
        **settings,
    )
    return Launch(decode_kernel, (splits, key_heads * selections, batch), arguments, constants)


@operator(
    "decode(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor visual_key, Tensor visual_value, "
    "Tensor runs, Tensor? logits, Tensor? taken, Tensor? mean_values, Tensor? sinks, Tensor(a!) partial, "
    "Tensor(b!) max_and_sum, Tensor(c!) arrived, float scale, float? softcap, int longest, int splits) -> Tensor",
)
def decode(*arguments: Any) -> Tensor:
    """What `attention` launches, and its output."""
    query, _, value, *_ = arguments
    output: Tensor = query.new_empty(*query.shape[:2], value.shape[3])
    decode_launch(*arguments, output=output).run(query.device)
    return output


@fake("decode")
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[3])


@operator("window_means(Tensor entries, Tensor start, Tensor length, int longest) -> Tensor")
def window_means(entries: Tensor, start: Tensor, length: Tensor, longest: int) -> Tensor:
    """Mean of every window, like `gazepatch.chunk.Chunk.means`. One launch.

    Args:
        entries: `[B, H, N, D]` in slot order.
        start, length: `[b, W]` int32, of the windows; `b` is 1 or B.
        longest: Tokens of the longest window.

    Returns:
        `[B, H, W, D]`; 0 for windows without tokens.
    """
    batch, heads, _, dim = entries.shape
    windows = length.shape[1]
    entries = entries if entries.stride(-1) == 1 else entries.contiguous()
    means = entries.new_empty(batch, heads, windows, dim)
    tokens = min(power(longest), 16)
    block = 64 // tokens
    with on(entries.device):
        means_kernel[-(-windows // block), batch * heads](
            entries,
            start,
            length,
            means,
            heads,
            windows,
            longest,
            *entries.stride()[:3],
            row_stride(length),
            DIM=dim,
            BLOCK_W=block,
            BLOCK_T=tokens,
            BLOCK_D=padded(dim),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return means


@fake("window_means")
def _(entries: Tensor, start: Tensor, length: Tensor, longest: int) -> Tensor:
    return entries.new_empty(*entries.shape[:2], length.shape[1], entries.shape[3])
