"""Masks as models make them: by slot where there are context tokens, and in the forms that attention takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from gazepatch.errors import UnsupportedModelError
from gazepatch.insertion import Insertion

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_position(visible: MaskFunction, position: Tensor, context: Tensor) -> MaskFunction:
    """A mask function of positions as one of slots: local windows and chunks are as long as without context tokens."""
    # Chunks are counted after the padding of a row, which in slots is more by those in front that stand for nothing.
    position = position + (position < 0).long().cumprod(-1).sum(-1, keepdim=True)

    def of_slots(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(batch, head, position[batch, query], position[batch, key])
        return seen & ((key <= query) | ~context[batch, key])

    return of_slots


class Documents(NamedTuple):
    """Sequences that are packed into a row: `number` `[b, S]` of that of each token, and `position` `[b, S]` in it."""

    number: Tensor
    position: Tensor

    def by_slot(self, insertion: Insertion) -> Documents:
        """The same, `[B, S']`; context tokens are where the last visual token of their image is."""
        source = insertion.source.clamp(min=0).to(self.number.device)
        return Documents(*(table.expand(len(source), -1).gather(1, source) for table in self))


def documents(call: Mapping[str, Any], cache: Cache | None, flash: bool) -> Documents | None:
    """The documents of a decoder's call whose position ids start again in the middle of a row; None without any.

    As transformers finds them: without a mask, and without a cache unless attention is `flash`.
    """
    position = call.get("position_ids")
    if position is None or call.get("attention_mask") is not None or (cache is not None and not flash):
        return None
    if position.dim() == 3:  # of text, then of time, height and width; three alone say nothing of documents
        if len(position) != 4:
            return None
        position = position[0]
    number = find_packed_sequence_indices(position)
    return None if number is None else Documents(number, position)


def block_mask(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Any,
    block_indices: Tensor,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The mask of block-sparse layers (MiniMax M3), which they make themselves only for implementations they know."""
    if position_ids is None:
        position_ids = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    positions = position_ids.expand(len(query), -1)
    made: Tensor = module.indexer.build_block_mask(
        block_indices, mask, key.shape[2], query.dtype, query.device, positions
    )
    return made


def as_4d(mask: Any) -> Tensor | None:
    """A mask `[B, 1, S, L]`, whichever form the original implementation takes.

    Raises:
        UnsupportedModelError: It is no tensor (flex attention).
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask
    if torch.is_tensor(mask) and mask.dim() == 2:  # flash attention: padding only
        return mask.bool()[:, None, None]
    raise UnsupportedModelError(
        f"expected an attention mask that is a tensor, got {type(mask).__name__}: "
        "load the model with attn_implementation='sdpa' before patching it"
    )


def of_keys(mask: Any, key: Tensor) -> Any:
    """A mask without the columns of room that a static cache has, but does not give to the attention of a prompt."""
    wider = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] > key.shape[2]
    return mask[..., : key.shape[2]] if wider else mask


def of_queries(mask: Tensor | None, columns: Tensor, positions: Tensor, queries: int, keys: int) -> Tensor | None:
    """`[B or 1, 1, Q, L]` of the queries in `columns` `[Q]` of `queries`, which are at `positions` among the keys."""
    if mask is None:
        return None
    if mask.shape[2] == 1 < queries:  # padding only, as for flash attention
        return mask & (torch.arange(keys, device=columns.device) <= positions[:, None])
    return mask.index_select(2, columns)
