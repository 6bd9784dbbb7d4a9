"""Parts of tiny models: text decoders, vision towers, random weights and pictures."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tiny.prompts import BOS, PAD

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


def since(version: str, name: str) -> Any:
    """A class that transformers has from this version on; skips a test that is too new for it."""
    if not hasattr(transformers, name):
        pytest.skip(f"needs transformers {version}, got {transformers.__version__}")
    return getattr(transformers, name)


def latent_text(kind: type, **settings: Any) -> Any:
    """Configuration of a text decoder whose cache holds latents (MLA), for keys of 20 numbers and values of 12."""
    latents = {"kv_lora_rank": 24, "q_lora_rank": 20, "num_key_value_heads": 4}
    heads = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    made = text(dict, **{**latents, **heads, **experts, "topk_group": 1, "first_k_dense_replace": 1, **settings})
    del made["head_dim"]  # which is another thing there
    return kind(**made)


def tower(kind: type, image_size: Any, patch_size: Any = 4, **settings: Any) -> Any:
    """Configuration of a vision tower for square images of `image_size` pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(**{**sizes, "image_size": image_size, "patch_size": patch_size, **settings})


def pixels(*shape: int) -> Tensor:
    """A picture of noise."""
    return torch.randn(shape)


def pixels_name(model: nn.Module, *older: str) -> str:
    """What the model calls the pixels of images; transformers 5.16 had `older` names in some families."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("pixel_values", *older) if name in names)


class StubTower(transformers.PreTrainedModel):
    """Stands in for a vision tower of timm, which the tests do without: mixes colours, and pools as `features` says."""

    config_class = transformers.SiglipVisionConfig
    _supports_sdpa = True

    def __init__(self, features: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__(transformers.SiglipVisionConfig(hidden_size=dim))
        self.features, self.colours = features, nn.Parameter(torch.randn(3, dim))

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        mixed = torch.einsum("bchw,cd->bdhw", pixel_values, self.colours)
        return BaseModelOutputWithPooling(last_hidden_state=self.features(mixed))


@contextmanager
def stub_tower(family: str, features: Callable[[Tensor], Tensor], dim: int) -> Iterator[None]:
    """Models of a family made inside have a `StubTower`."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    real = module.AutoModel

    class Instead:
        @staticmethod
        def from_config(config: Any, **settings: Any) -> Any:
            timm = isinstance(config, (transformers.TimmWrapperConfig, transformers.Gemma3nVisionConfig))
            return StubTower(features, dim) if timm else real.from_config(config, **settings)

    module.AutoModel = Instead
    try:
        yield
    finally:
        module.AutoModel = real
