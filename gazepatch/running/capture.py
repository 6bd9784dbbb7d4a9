"""Hooks that only look: they note what a multimodal model is called with, for the forward of its text decoder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gazepatch.caches.latents import Expand
from gazepatch.running.runtime import FeatureOrigin, Prefill, Runtime

MODALITIES = ("image", "video")
#: The argument that tells layers which run several times a token how far after their own the cache's layer is.
OFFSET = "cache_offset"


class Capture:
    """What one patched model is called with is noted in `runtime.running`."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the token ids and the padding mask of the forward that starts."""
        running = self.runtime.running
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, mask = bound.get("input_ids"), bound.get("attention_mask")
        running.ids = ids if torch.is_tensor(ids) else None
        running.encoded = bool(encoded := bound.get("mm_encoder_outputs"))
        for modality, features in (encoded or {}).items():  # made before, and perhaps others since
            if (origin := running.origins.of(features)) is not None:
                running.captured[modality] = origin
        running.mask = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    def after_model(self, *_: Any) -> None:
        """Forget them."""
        running = self.runtime.running
        running.ids = running.mask = None

    def features(self, modality: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `get_image_features` or `get_video_features`, which every path goes through, to see its arguments."""
        signature = inspect.signature(function)

        @functools.wraps(function)  # generate() reads the signature
        def captured(*args: Any, **kwargs: Any) -> Any:
            running = self.runtime.running
            # Video features are often made by way of image features; a dense forward needs none of this.
            if running.capturing or running.dense:
                return function(*args, **kwargs)
            arguments = _arguments(signature, args, kwargs)
            running.capturing = True
            try:
                features = function(*args, **kwargs)
            finally:
                running.capturing = False
            # A forward has room for all the features that it makes itself.
            origin = FeatureOrigin(arguments, _tokens(features) if running.ids is None else 0)
            running.captured[modality] = origin
            running.origins.note(features, origin)
            return features

        return captured

    def prefill(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `_prefill` of `generate`, to know of a prompt that comes in pieces what is still to come."""

        @functools.wraps(function)
        def prefilled(
            input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            running = self.runtime.running
            if getattr(generation_config, "prefill_chunk_size", None) is not None:
                mask = model_kwargs.get("attention_mask")  # of the whole sequence, also where ids are of a later turn
                running.prefill = Prefill(input_ids, (input_ids if mask is None else mask).shape[1])
            try:
                return function(input_ids, generation_config, model_kwargs, *args, **kwargs)
            finally:
                running.prefill = None

        return prefilled

    def before_run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember which run of a layer starts, by the number of its keys in the cache."""
        self.runtime.running.offset = kwargs.get(OFFSET, 0)

    def latents(self, expand: Expand) -> Expand:
        """Wrap `expand_kv` of an attention module, to see the latents of a forward without a cache too."""

        @functools.wraps(expand)
        def expanded(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
            self.runtime.running.latents = latent, rotated
            return expand(latent, rotated)

        return expanded


def _arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    names = [name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    extra: dict[str, Any] = {}
    for name in names:
        extra |= bound.pop(name, {})
    return {**bound, **extra}


def _tokens(features: Any) -> int:
    """How many tokens take these features: all in one tensor, or in one for each image; 0 where that cannot be seen."""
    made = getattr(features, "pooler_output", None)
    tensors = [made] if torch.is_tensor(made) else made if isinstance(made, (list, tuple)) else []
    return sum(x.numel() // x.shape[-1] for x in tensors if torch.is_tensor(x))
