"""Artefacts are loaded: checked against their base model, which is then patched."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.artefact.checkpoint import known_layout
from gazepatch.artefact.contents import read_artefact
from gazepatch.artefact.finding import artefact_folder, base_config, base_of
from gazepatch.artefact.manifest import LORA_NAME, processor_geometry
from gazepatch.artefact.provenance import remember
from gazepatch.artefact.weights import load_model
from gazepatch.config import GazeConfig
from gazepatch.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of from_pretrained that say how the Hub is reached: they hold for the artefact and for its base model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def load(
    path_or_repo: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load the model of an artefact, its own or its base model, and patch it.

    Args:
        path_or_repo: Artefact folder, or Hub id of one.
        base: Where to load the base model from instead of the place the artefact names.
        revision: Commit, branch or tag of the artefact on the Hub. The base model has its own, in the artefact.
        **from_pretrained_kwargs: Passed on to `AutoModelForImageTextToText.from_pretrained`.

    Raises:
        ConfigError: Settings of gaze were given, and an artefact has its own; or a revision of a local folder; or
            `output_loading_info`.
        ArtefactError: The artefact is damaged, or does not fit the base model, or weights of that are missing or have
            other shapes than its `config.json` says.
        HubError: There is no such folder, and the Hub does not give it.
    """
    from gazepatch.lora_checkpoint import load_lora
    from gazepatch.patch import apply

    _refuse_settings(from_pretrained_kwargs)
    hub = {name: from_pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in from_pretrained_kwargs}
    folder = artefact_folder(path_or_repo, revision, **hub)
    manifest, tokens = read_artefact(folder)
    source, at = base_of(manifest, folder, base)
    # Before the weights, so that a wrong model costs no download.
    manifest.check(base_config(source, revision=at, **hub))
    layout = known_layout(Path(source)) if os.path.isdir(source) else None
    manifest.check_files(processor_geometry(source, revision=at, **hub), layout)
    lora = folder / LORA_NAME
    if (manifest.provenance or {}).get("trainable") == "lora" and not lora.is_dir():
        raise ArtefactError(f"{folder} must hold the folder {LORA_NAME} that was trained with it: get a new copy")
    model: PreTrainedModel = load_model(source, revision=at, **from_pretrained_kwargs)
    manifest.check(model.config)
    if lora.exists():
        load_lora(model, lora)
    apply(model, manifest.gaze, context_tokens=tokens)
    if not manifest.full:  # whose weights may have changed meanwhile, which is long to find out
        remember(model, manifest.provenance)
    return model


def _refuse_settings(given: dict[str, Any]) -> None:
    """What a GazeConfig holds would end up at the model's class, or nowhere."""
    names = {field.name for field in dataclasses.fields(GazeConfig)}
    if wrong := [name for name, value in given.items() if name in names or isinstance(value, GazeConfig)]:
        raise ConfigError(
            f"an artefact has settings of its own, got {', '.join(wrong)}: load it, then call gazepatch.set_budget; or "
            "load the base model with transformers and call gazepatch.apply"
        )
