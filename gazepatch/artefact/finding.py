"""Artefacts and their base models are found: on this machine, or on the Hub and then fetched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gazepatch.artefact.checkpoint import BESIDE, CONFIG_NAME, INDEX_NAME, LICENCES, WEIGHTS_NAME, shards_of
from gazepatch.artefact.manifest import CARD_NAME, FILE_NAME, LORA_NAME, Manifest, read
from gazepatch.context import TOKENS_NAME
from gazepatch.errors import ArtefactError
from gazepatch.hub.fetching import fetch


def is_artefact(path_or_repo: str | Path) -> bool:
    """Whether this is an artefact (a folder or a Hub id) rather than a model."""
    if os.path.exists(path_or_repo):
        return Path(path_or_repo, FILE_NAME).is_file()
    from huggingface_hub import file_exists

    try:
        return file_exists(str(path_or_repo), FILE_NAME)
    except Exception:  # no such repository, not a valid name, no network: loading says which
        return False


def artefact_folder(path_or_repo: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """The local folder of an artefact; if it is a Hub id, of a download of its files, weights only if it is full."""
    if os.path.exists(path_or_repo):
        return Path(path_or_repo)
    wanted = [FILE_NAME, CARD_NAME, TOKENS_NAME, f"{LORA_NAME}/*"]
    found = fetch(path_or_repo, only=wanted, revision=revision, **hub)
    if read(found.path).full:
        local_checkpoint(str(path_or_repo), found.commit, **hub)
    return found.path


def local_checkpoint(repo: str, revision: str | None, **hub: Any) -> Path:
    """A local folder with the files of a whole checkpoint on the Hub, downloaded unless they were before."""
    found = fetch(repo, only=[*BESIDE, *LICENCES, INDEX_NAME], revision=revision, **hub)
    index = found.path / INDEX_NAME
    weights = [shard.name for shard in shards_of(index)] if index.is_file() else [WEIGHTS_NAME]
    return fetch(repo, only=weights, revision=found.commit, **hub).path


def base_of(manifest: Manifest, folder: Path, base: str | Path | None = None) -> tuple[str, str | None]:
    """Where to load the model of an artefact in `folder` from: folder or Hub id, and revision."""
    if manifest.full:
        if base is not None:
            raise ArtefactError(f"{folder} brings its own weights, so base must not be given, got {base}")
        return str(folder), None
    assert manifest.base_model is not None  # as `read` has checked
    if base is not None and str(base) != manifest.base_model:
        return str(base), None
    if os.path.isabs(manifest.base_model) and not os.path.isdir(manifest.base_model):
        raise ArtefactError(
            f"base model folder {manifest.base_model} not found: it was moved, or the artefact was made on another "
            "machine; say where the model is with gazepatch.load(..., base=...)"
        )
    return manifest.base_model, manifest.base_revision


def base_config(source: str | Path, *, revision: str | None = None, **hub: Any) -> Any:
    """The transformers configuration of a model with an adapter, by folder or Hub id.

    Raises:
        UnsupportedModelError: There is no adapter for its model type.
        ArtefactError: The folder holds no model, or a damaged one.
        HubError: There is no such folder, and the Hub does not give it.
    """
    from transformers import AutoConfig

    from gazepatch.registry import adapter_for

    found = fetch(source, file=CONFIG_NAME, revision=revision, **hub)
    try:
        model_type = json.loads(found.path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:  # bad JSON and bad UTF-8; no object
        raise ArtefactError(f"{found.path} must be a JSON object: {error}; get the model again") from None
    adapter_for(str(model_type))  # our own error first: transformers refuses types that it does not know itself
    try:
        return AutoConfig.from_pretrained(str(source), revision=found.commit, **hub)
    except Exception as error:  # what classes of configurations raise at values of the wrong kind
        raise ArtefactError(
            f"{found.path} must be the configuration of a {model_type} model: {' '.join(str(error).split())}"
        ) from error
