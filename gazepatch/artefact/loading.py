"""Artefacts are read here: found, checked against their base model, and loaded with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.artefact.checkpoint import (
    BESIDE,
    CONFIG_NAME,
    INDEX_NAME,
    LICENCES,
    WEIGHTS_NAME,
    known_layout,
    shards_of,
)
from gazepatch.artefact.manifest import CARD_NAME, FILE_NAME, LORA_NAME, TOKENS_NAME, Manifest, processor_geometry, read
from gazepatch.errors import ArtefactError
from gazepatch.hub.fetching import fetch

if TYPE_CHECKING:
    from torch import Tensor
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
        ArtefactError: The artefact is damaged, or does not fit the base model.
        HubError: There is no such folder, and the Hub does not give it.
    """
    from transformers import AutoModelForImageTextToText

    from gazepatch.lora import load_lora
    from gazepatch.patch import apply

    hub = {name: from_pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in from_pretrained_kwargs}
    folder = artefact_folder(path_or_repo, revision, **hub)
    manifest, tokens = read_artefact(folder)
    source, at = base_of(manifest, folder, base)
    # Before the weights, so that a wrong model costs no download.
    manifest.check(config := base_config(source, revision=at, **hub))
    if manifest.full and getattr(config, "gaze", None) != manifest.gaze.to_dict():
        raise ArtefactError(
            f"the settings in {folder / CONFIG_NAME} differ from those in {FILE_NAME}, which nothing but both tell "
            "apart from a mixture of two artefacts: get it again"
        )
    layout = known_layout(Path(source)) if os.path.isdir(source) else None
    manifest.check_files(processor_geometry(source, revision=at, **hub), layout)
    if (manifest.provenance or {}).get("trainable") == "lora" and not (folder / LORA_NAME).is_dir():
        raise ArtefactError(f"{folder} must hold the folder {LORA_NAME} that was trained with it: get it again")
    model = AutoModelForImageTextToText.from_pretrained(source, revision=at, **from_pretrained_kwargs)
    manifest.check(model.config)
    load_lora(model, folder)
    return apply(model, manifest.gaze, context_tokens=tokens)


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


def read_artefact(folder: Path) -> tuple[Manifest, Tensor | None]:
    """The manifest and the context tokens of an artefact folder, checked as far as they can be without the model.

    Raises:
        ArtefactError: Something is damaged, or does not belong to the rest.
    """
    manifest = read(folder)
    return manifest, _tokens_of(folder, manifest)


def _tokens_of(folder: Path, manifest: Manifest) -> Tensor | None:
    """The context tokens of an artefact, as many as its settings say."""
    from gazepatch.context import read_context_tokens

    expected, path = manifest.gaze.context_tokens, folder / TOKENS_NAME
    if not expected and not path.exists():
        return None
    if not expected:
        raise ArtefactError(
            f"{path} is there, but {FILE_NAME} says context_tokens 0: one of them is not this artefact's"
        )
    tokens = read_context_tokens(path, manifest.model_type, manifest.hidden_size)
    if len(tokens) != expected:
        raise ArtefactError(f"{path} must hold {expected} context tokens, as {FILE_NAME} says, got {len(tokens)}")
    return tokens
