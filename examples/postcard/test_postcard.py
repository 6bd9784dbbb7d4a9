"""The package's own test: gazepatch's conformance suite on a tiny postcard. Run it where the package is installed."""

from __future__ import annotations

import pytest
import torch
from postcard import PostcardConfig, PostcardForConditionalGeneration
from transformers import CLIPVisionConfig, LlamaConfig

from gazepatch.conformance import AdapterConformance, Case
from gazepatch.layout import Span

IMAGE, SIDE, STAMP = 90, 8, 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class TestPostcard(AdapterConformance):
    @pytest.fixture(scope="class")
    def case(self) -> Case:
        torch.manual_seed(0)
        config = PostcardConfig(
            vision_config=CLIPVisionConfig(**SIZES, image_size=4 * SIDE, patch_size=4),
            text_config=LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=100),
            image_token_index=IMAGE,
        )
        model = PostcardForConditionalGeneration(config).eval()
        with torch.no_grad():
            for weight in model.parameters():  # attention is uniform with the usual small ones
                weight.copy_(torch.randn_like(weight) * 0.2)
        settings = model.generation_config
        settings.eos_token_id, settings.pad_token_id, settings.suppress_tokens = None, 0, [IMAGE]
        ids = torch.tensor([[1, 5, 6, *[IMAGE] * (STAMP + SIDE**2), 7, 8, 9]])
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, 3, 4 * SIDE, 4 * SIDE),
        }
        start = 3 + STAMP
        return Case(model, inputs, [Span(0, start, start + SIDE**2, grid=(1, SIDE, SIDE), media=0)])
