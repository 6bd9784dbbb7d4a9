"""Parts of tiny models: text decoders, vision towers, random weights and pictures."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from tiny.prompts import BOS, PAD
from torch import Tensor, nn

VOCAB = 1000


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw larger weights: with the usual ones attention is uniform, and nothing would notice what is left out."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            fan_in = weight[0].numel()
            weight.copy_(torch.randn(weight.shape, generator=generator) * min(0.5, 1.5 / math.sqrt(fan_in)))


def text(kind: type = transformers.LlamaConfig, **settings: Any) -> Any:
    """Configuration of a text decoder: two query heads share a key head."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": 2}
    return kind(**{**sizes, **heads, **special, **settings})


def tower(kind: type, image_size: Any, patch_size: Any = 4, **settings: Any) -> Any:
    """Configuration of a vision tower for square images of `image_size` pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(**{**sizes, "image_size": image_size, "patch_size": patch_size, **settings})


def pixels(*shape: int) -> Tensor:
    """A picture of noise."""
    return torch.randn(shape)
