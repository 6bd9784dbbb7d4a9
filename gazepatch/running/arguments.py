"""What an attention module asks for beyond scaled dot products with its keys, by arguments and attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gazepatch.errors import UnsupportedModelError
from gazepatch.running.forward import Forward
from gazepatch.score_mod import ScoreMod

#: Arguments that pick the keys already.
UNSUPPORTED = ("indices", "block_indices")


def scores_of(original: str, query: Tensor, options: dict[str, Any]) -> ScoreMod:
    """What the implementation `original` makes of dot products: sdpa knows neither soft caps nor sinks."""
    scaling, bias = options.get("scaling"), options.get("position_bias")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if original == "sdpa":
        return ScoreMod(scale, bias=bias)
    if (sinks := options.get("s_aux")) is not None:
        sinks = sinks.view(1, -1, 1)
    elif (of_queries := options.get("sinks")) is not None:  # [B, H, Q, 1]
        sinks = of_queries[..., 0]
    return ScoreMod(scale, options.get("softcap"), sinks, bias)


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raise UnsupportedModelError for arguments that gaze attention does not honour."""
    if present := [name for name in UNSUPPORTED if options.get(name) is not None]:
        raise UnsupportedModelError(
            f"this model's attention uses {', '.join(present)}, which gaze attention does not honour: "
            "name the layers in dense_layers"
        )


def tempered(module: Any, query: Tensor, forward: Forward) -> Tensor:
    """`query` `[B, H, S, D]`, which Llama 4 has sharpened by slot where it has no rotary embedding, by position."""
    new = slice(forward.past, forward.past + query.shape[2])
    positions, _ = forward.state.every_slot(query.device)

    def factor(at: Tensor) -> Tensor:
        sharpened: Tensor = torch.log1p(torch.floor((at.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        return sharpened

    slots = torch.arange(new.start, new.stop, device=query.device)
    ratio = factor(positions[:, new].clamp(min=0)) / factor(slots)
    return (query * ratio[:, None, :, None]).to(query.dtype)
