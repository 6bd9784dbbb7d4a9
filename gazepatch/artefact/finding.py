"""Artefacts and their base models are found: on this machine, or on the Hub and then fetched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gazepatch.artefact.checkpoint import (
    BESIDE,
    CONFIG_NAME,
    INDEX_NAME,
    LICENCES,
    WEIGHTS_NAME,
    config_values,
    shards_of,
)
from gazepatch.artefact.manifest import CARD_NAME, FILE_NAME, LORA_NAME, Manifest, read
from gazepatch.context import TOKENS_NAME
from gazepatch.errors import ArtefactError, HubError
from gazepatch.hub.failures import hub_failures
from gazepatch.hub.fetching import fetch, is_repo_id, try_again


def is_artefact(path_or_repo: str | Path, revision: str | None = None) -> bool:
    """Whether this is an artefact (a folder or a Hub id) rather than a model, or nothing at all.

    Where the Hub does not say, the cache does if it can.

    Raises:
        HubError: Neither does: no connection, a gated repository, a token that is not valid.
    """
    if os.path.exists(path_or_repo):
        return Path(path_or_repo, FILE_NAME).is_file()
    from huggingface_hub import HfApi

    repo = str(path_or_repo)
    if not is_repo_id(repo):
        return False
    try:
        with hub_failures(f"looking for {FILE_NAME} in {repo}", repo, try_again(repo)):
            return HfApi(library_name="gazepatch").file_exists(repo, FILE_NAME, revision=revision)
    except HubError:
        if (known := _is_artefact_in_cache(repo, revision)) is None:
            raise
        return known


def refuse_artefact(source: str | Path, revision: str | None = None) -> None:
    """Refuse an artefact where a plain model is wanted: its settings and context tokens would be lost without a word.

    Raises:
        ArtefactError: It is an artefact; the message says what to take in its place.
        HubError: As `is_artefact`.
    """
    if not is_artefact(source, revision):
        return
    manifest = read(fetch(source, file=FILE_NAME, revision=revision).path.parent)
    base = f"its base model, {manifest.base_model}" if manifest.base_model is not None else ""
    own = f"a copy of its folder without {FILE_NAME}, which is a plain model" if manifest.full else ""
    raise ArtefactError(
        f"expected a model without gaze, got {source}, which is an artefact of gazepatch already: take "
        + ", or ".join(filter(None, (base, own)))
    )


def _is_artefact_in_cache(repo: str, revision: str | None) -> bool | None:
    """What the cache knows of a repository; None if it has neither the manifest nor a model without gaze."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, FILE_NAME, revision=revision), str):
        return True
    if not isinstance(path := try_to_load_from_cache(repo, CONFIG_NAME, revision=revision), str):
        return None
    try:  # plain transformers may have fetched it, of a full artefact as well, which says so there
        return None if "gaze" in config_values(Path(path)) else False
    except ArtefactError:
        return None


def artefact_folder(path_or_repo: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """The local folder of an artefact; if it is a Hub id, of a download of its files, weights only if it is full.

    Raises:
        ConfigError: A revision was given for a local folder.
    """
    wanted = [FILE_NAME, CARD_NAME, TOKENS_NAME, f"{LORA_NAME}/*"]
    found = fetch(path_or_repo, only=wanted, revision=revision, **hub)
    if found.commit is not None and read(found.path).full:
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
            "machine; say where the model is with gazepatch.load(..., base=...) or --base MODEL"
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
    model_type = config_values(found.path).get("model_type")
    adapter_for(str(model_type))  # our own error first: transformers refuses types that it does not know itself
    try:
        return AutoConfig.from_pretrained(str(source), revision=found.commit, **hub)
    except Exception as error:  # what classes of configurations raise at values of the wrong kind
        raise ArtefactError(
            f"{found.path} must be the configuration of a {model_type} model: {' '.join(str(error).split())}"
        ) from error
