"""How an adapter was trained goes from `load` to `save`, as long as what was trained is what was loaded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("gazepatch")

_ATTRIBUTE = "_gazepatch_origin"  # of the model: it outlasts a patch, which many functions take off and put on again


@dataclass(frozen=True)
class _Origin:
    provenance: Mapping[str, Any]
    digest: str


def remember(model: Any, provenance: Mapping[str, Any] | None) -> None:
    """Note on a patched model how its context tokens and LoRA adapters, as they are now, came about."""
    if provenance is not None:
        setattr(model, _ATTRIBUTE, _Origin(provenance, _digest(model)))


def remembered(model: Any) -> Mapping[str, Any] | None:
    """How the context tokens and LoRA adapters of a patched model came about; None if they were changed since."""
    origin = getattr(model, _ATTRIBUTE, None)
    if not isinstance(origin, _Origin):
        return None
    if origin.digest == _digest(model):
        return origin.provenance
    logger.warning(
        "context tokens or LoRA adapters are no longer those that were loaded, so the artefact does not say how they "
        "were trained: pass provenance to gazepatch.save"
    )
    return None


def _digest(model: Any) -> str:
    """A fingerprint of context tokens and LoRA adapters: names, types, shapes and values."""
    import torch

    from gazepatch.lora import adapter_weights, has_lora
    from gazepatch.patch import context_tokens_of

    adapters = model.peft_config if has_lora(model) else ()
    tensors = {f"{name} {key}": held for name in adapters for key, held in adapter_weights(model, name).items()}
    if (tokens := context_tokens_of(model)) is not None:
        tensors["context tokens"] = tokens
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if not tensor.is_meta:  # as those are that accelerate brings in for their layer alone
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
