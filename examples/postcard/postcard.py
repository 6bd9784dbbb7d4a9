"""A model that is not in transformers: LLaVA, but every image has a stamp of four tokens in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

STAMP = 4


class PostcardConfig(LlavaConfig):
    model_type = "postcard"


class PostcardForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = PostcardConfig

    def __init__(self, config: PostcardConfig) -> None:
        super().__init__(config)
        self.model.stamp = nn.Parameter(torch.randn(STAMP, config.text_config.hidden_size))
        self.model.get_image_features = self._stamped(self.model.get_image_features)

    def _stamped(self, features: Any) -> Any:
        def get_image_features(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            output = features(pixel_values=pixel_values, **kwargs)
            output.pooler_output = [torch.cat([self.model.stamp, image]) for image in output.pooler_output]
            return output

        return get_image_features
