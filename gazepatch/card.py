"""The model card of an artefact: front matter for the Hub, then how to load it and what is known of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gazepatch.manifest import Manifest

_CARD = """\
---
base_model: {base_yaml}
library_name: gazepatch
pipeline_tag: image-text-to-text
tags:
- gazepatch
- gaze-attention
- {model_type}
---

# Gaze attention for {title}

Settings that let a `{model_type}` model read only the regions of its images that each new token needs. {tokens} The
model's own weights stay with the base model, {base}{revision}.

```python
import gazepatch

model = gazepatch.load({placeholder})
gazepatch.restore(model)  # the base model again, exactly
```

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


def model_card(manifest: Manifest) -> str:
    """The text of `README.md` beside a manifest."""
    base, revision = manifest.base_model, manifest.base_revision
    return _CARD.format(
        base_yaml=json.dumps(base, ensure_ascii=False),  # JSON strings are YAML strings, whatever is in the name
        base=f"`{base}`",
        title=base.replace("\\", "/").rstrip("/").rpartition("/")[2],
        revision=f" at revision `{revision}`" if revision else "",
        tokens=_tokens(manifest.gaze.context_tokens),
        placeholder='"path/of/this/folder"',
        model_type=manifest.model_type,
        settings="\n".join(f"| `{name}` | `{json.dumps(value)}` |" for name, value in manifest.gaze.to_dict().items()),
        measured=_measured(manifest),
        gazepatch_version=manifest.gazepatch_version,
        transformers_version=manifest.transformers_version,
    )


def _tokens(count: int) -> str:
    if not count:
        return "There are no weights here."
    return f"`context_tokens.safetensors` holds the embeddings of {count} tokens that follow each image or frame."


def _measured(manifest: Manifest) -> str:
    if manifest.fidelity is None and manifest.provenance is not None:
        return (
            f"How this was trained, and what the training saw at its end, on its own data:\n\n"
            f"{_listing(manifest.provenance)}\n\nOn data that were not trained on, nothing was measured yet."
        )
    if manifest.fidelity is None:
        return (
            "Nothing yet: nobody trained this model with gaze, and how closely "
            "its answers follow those of the base model was not measured. "
            "`gazepatch verify` checks that the patch itself is sound; the quality of answers is for you to test."
        )
    trained = "none" if manifest.provenance is None else f"\n\n{_listing(manifest.provenance)}"
    return f"Training: {trained}\n\nFidelity:\n\n{_listing(manifest.fidelity)}"


def _listing(values: object) -> str:
    return f"```json\n{json.dumps(values, indent=2)}\n```"
