"""The model card of an artefact: metadata for the Hub, then how to load it and what is known of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.hub.fetching import is_repo_id

if TYPE_CHECKING:
    from gazepatch.artefact.manifest import Manifest

_CARD = """\
---
{metadata}
---

# Gaze attention for {title}

{what}

```python
import gazepatch

model = gazepatch.load("this/repository")  # its id on the Hub, or the folder that you have it in
gazepatch.restore(model)  # {restored}
```
{plain}
## Settings

| setting | value |
|---|---|
{settings}

## What was measured

{measured}

## What this does not do

Every visual token stays in the cache: gaze attention saves reads and compute, not memory.

Made with gazepatch {gazepatch_version} and transformers {transformers_version}.
"""

_ADAPTER = """\
Settings that let a `{model_type}` model read only the regions of its images that each new token needs. {weights}
The model's own weights stay with the base model, {base}."""

_FULL = """\
A `{model_type}` model with settings that let it read only the regions of its images that each new token needs.
{weights} {origin}"""

_PLAIN = """
Plain transformers loads the same folder as an ordinary model, which reads everything:
`AutoModelForImageTextToText.from_pretrained("this/repository")`.
"""


def card_of(manifest: Manifest, licence: Mapping[str, Any] | None = None, lora: bool = False) -> str:
    """The text of `README.md` beside a manifest.

    Args:
        manifest: Of the artefact.
        licence: The base model's, as `licence_of` returns it.
        lora: Whether there is an adapter beside it.
    """
    restored = "the base model with its adapter, without gaze" if lora else "the base model, exactly"
    return _CARD.format(
        metadata=_metadata(manifest, licence or {}),
        title=(manifest.base_model or manifest.model_type).replace("\\", "/").rstrip("/").rpartition("/")[2],
        what=_what(manifest, lora),
        restored="the dense model, exactly" if manifest.full else restored,
        plain=_PLAIN if manifest.full else "",
        settings="\n".join(f"| `{name}` | `{json.dumps(value)}` |" for name, value in manifest.gaze.to_dict().items()),
        measured=_measured(manifest),
        gazepatch_version=manifest.gazepatch_version,
        transformers_version=manifest.transformers_version,
    )


def licence_of(source: str | Path) -> dict[str, Any]:
    """What the card of a model (a folder, a card's file or a Hub id) says of its licence; `{}` if nothing."""
    from huggingface_hub import ModelCard

    path = Path(source)
    if path.is_dir():
        path = path / "README.md"
        if not path.is_file():
            return {}
    try:
        data = ModelCard.load(path if path.is_file() else str(source), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card, no network, no valid metadata: then there is nothing to inherit
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}


def _metadata(manifest: Manifest, licence: Mapping[str, Any]) -> str:
    """Front matter that the Hub accepts: it knows base models by their id on it only."""
    from huggingface_hub import ModelCardData

    base: dict[str, Any] = {}
    if manifest.base_model is not None and is_repo_id(manifest.base_model):
        # The Hub counts a checkpoint with other weights among the fine-tuned ones, and calls the rest adapters.
        base = {"base_model": manifest.base_model, "base_model_relation": "finetune" if manifest.full else "adapter"}
    data = ModelCardData(
        **base,
        **licence,
        library_name="gazepatch",
        pipeline_tag="image-text-to-text",
        tags=["gazepatch", "gaze-attention", manifest.model_type],
    )
    return data.to_yaml().strip()


def _what(manifest: Manifest, lora: bool) -> str:
    base = f"`{manifest.base_model}`" + (f" at revision `{manifest.base_revision}`" * bool(manifest.base_revision))
    weights = _weights(manifest.gaze.context_tokens, lora)
    if not manifest.full:
        return _ADAPTER.format(model_type=manifest.model_type, weights=weights, base=base)
    if (manifest.provenance or {}).get("trainable") == "full":
        origin = f"The weights are those of {base if manifest.base_model else 'the model'}, trained with gaze."
    else:  # of a model that is saved from memory, nobody knows what was done to it since it was loaded
        came = f"; the model came from {base}" if manifest.base_model else ""
        origin = f"The weights lie in the same folder, as they were when it was made{came}."
    return _FULL.format(model_type=manifest.model_type, weights=weights, origin=origin)


def _weights(context_tokens: int, lora: bool) -> str:
    """What an artefact holds beside the model's own weights."""
    said = []
    if context_tokens:
        said.append(
            f"`context_tokens.safetensors` holds the embeddings of {context_tokens} tokens that follow each image or "
            "frame."
        )
    if lora:
        said.append("`lora/` holds an adapter of PEFT, which stays on the model when gaze is taken off.")
    return " ".join(said) or "There are no weights of gazepatch's own."


def _measured(manifest: Manifest) -> str:
    if manifest.fidelity is None and manifest.provenance is not None:
        return (
            f"How this was trained, and what the training saw at its end, on its own data:\n\n"
            f"{_listing(manifest.provenance)}\n\nOn data that were not trained on, nothing was measured yet."
        )
    if manifest.fidelity is None:
        return (
            "Nothing yet: how closely its answers follow those of the dense model was not measured, and nothing is "
            "recorded of a training with gaze. `gazepatch verify` checks that the patch itself is sound; the quality "
            "of answers is for you to test."
        )
    trained = " nothing is recorded." if manifest.provenance is None else f"\n\n{_listing(manifest.provenance)}"
    return f"Training:{trained}\n\nFidelity to dense:\n\n{_listing(manifest.fidelity)}"


def _listing(values: object) -> str:
    return f"```json\n{json.dumps(values, indent=2)}\n```"
