"""Artefacts are made here: folders that turn a base model into a gazing one, with its weights or without."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.artefact.card import card_of, licence_of
from gazepatch.artefact.checkpoint import (
    BESIDE,
    LICENCES,
    PROCESSORS,
    Progress,
    add_to_config,
    checkpoint_files,
    copy_files,
    files_beside,
    key_layout,
    known_layout,
)
from gazepatch.artefact.contents import read_artefact
from gazepatch.artefact.finding import base_config, local_checkpoint, refuse_artefact
from gazepatch.artefact.folders import check_output, complete_folder
from gazepatch.artefact.manifest import CARD_NAME, FILE_NAME, LORA_NAME, Manifest, processor_geometry
from gazepatch.artefact.provenance import remembered
from gazepatch.config import GazeConfig, settings_of
from gazepatch.context import TOKENS_NAME, with_context_tokens, write_context_tokens
from gazepatch.errors import ArtefactError, GazeError
from gazepatch.files import replace_file
from gazepatch.hub.fetching import fetch
from gazepatch.layers import gaze_layers
from gazepatch.registry import adapter_for

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger("gazepatch")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    config: GazeConfig | None = None,
    context_tokens: Tensor | str | Path | None = None,
    full: bool = False,
    link: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Path:
    """Make an artefact for a model, from its small files alone: no weights are loaded.

    Args:
        source: Local folder or Hub id of a vision-language model. It is never written to.
        out: Folder to write; new, or empty.
        config: Settings, by default `GazeConfig()`.
        context_tokens: Trained context tokens, as for `gazepatch.apply`.
        full: Take the model's own files along, so that the folder is a checkpoint that plain transformers loads too.
        link: With `full`, make hard links of the weights where the file system can. They take no room, but then whoever
            overwrites them in place changes both.
        revision: Commit, branch or tag of the model on the Hub.
        force: Replace `out` if it is an artefact already, once the new one is complete.
        progress: With `full`, called with the bytes copied so far and those there are.
        **settings: Fields of `GazeConfig` to change in `config`.

    Returns:
        The folder, as an absolute path.

    Raises:
        UnsupportedModelError: The architecture has no adapter, or no layer of it can gaze.
        ArtefactError: `source` is not a model, or an artefact already; the context tokens are not for it; `out` cannot
            be written.
        ConfigError: A setting is wrong, or arguments do not go together.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ArtefactError(
            f"expected a local folder or a Hub id, got a {type(source).__name__}: "
            "gazepatch.save writes the artefact of a patched model"
        )
    gaze = settings_of(config, GazeConfig()).changed(settings)
    refuse_artefact(source, revision)
    model_config = base_config(source, revision=revision)
    adapter = adapter_for(model_config.model_type)
    hidden_size = adapter.text_config(model_config).hidden_size
    gaze, tokens = with_context_tokens(gaze, context_tokens, model_config.model_type, hidden_size)
    gaze_layers(adapter, model_config, gaze)  # refuses settings under which none would gaze
    out, local = Path(out).absolute(), _local(source)
    check_output(out, local, force)
    geometry = processor_geometry(str(source), revision=revision)
    manifest = replace(Manifest.of(model_config, gaze, str(local or source)), processor_geometry=geometry)
    if not full:
        manifest = replace(manifest, key_layout=known_layout(local) if local is not None else None)
        return _write(out, manifest, tokens, force, licence=licence_of(local or source))

    checkpoint = local or local_checkpoint(str(source), manifest.base_revision)
    names = checkpoint_files(checkpoint)

    def own_files(folder: Path) -> None:
        copy_files(checkpoint, folder, names, link=link, progress=progress)

    manifest = replace(manifest, full=True, base_model=None if local is not None else manifest.base_model)
    return _write(out, manifest, tokens, force, own_files, licence_of(local or source))


def save(
    model: PreTrainedModel,
    out: str | Path,
    *,
    full: bool = False,
    processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the artefact of a patched model: settings, context tokens, LoRA adapters, its base model's name.

    Args:
        model: The patched model.
        out: Folder to write; new, or empty.
        full: Write the model's own weights as they are now as well, for a model that was trained as a whole.
        processor: With `full`, what belongs beside them. By default the files of the tokenizer and the processor, and
            the licence, are copied from where the model was loaded; there is a warning if there is no processor.
        provenance: How it was trained, for `gaze_config.json`: anything that JSON can hold. By default that of the
            adapter that the model was loaded from, if its context tokens and LoRA adapters are still the same.
        force: Replace `out` if it is an artefact already, once the new one is complete.

    Raises:
        PatchError: The model is not patched.
        ArtefactError: It was not loaded from anywhere, or `out` cannot be written.
    """
    from gazepatch.lora import has_lora
    from gazepatch.lora_checkpoint import refuse_prompts, save_lora
    from gazepatch.patch import context_tokens_of, patch_of, root_model

    refuse_prompts(model)
    root = root_model(model)
    gaze, config = patch_of(model).config, root.config
    if full and has_lora(root):
        raise ArtefactError("a full artefact has no LoRA adapters beside it: merge them into the model first")
    source = getattr(config, "_name_or_path", "") or None
    out, local = Path(out).absolute(), _local(source)
    # A full artefact does not need a folder of this machine, and others need not know of it.
    base = (None if full else str(local)) if local is not None else _on_hub(config)
    if base is None and not full:
        raise ArtefactError(f"an artefact names its base model, and this one {_nowhere(source)}")
    check_output(out, local, force)
    provenance = remembered(root) if provenance is None else provenance
    manifest = replace(Manifest.of(config, gaze, base), full=full, provenance=provenance)
    if source is not None:
        geometry = processor_geometry(source, revision=manifest.base_revision)
        layout = known_layout(local) if local is not None else None
        manifest = replace(manifest, processor_geometry=geometry, key_layout=layout)

    def own_files(folder: Path) -> None:
        if has_lora(root):
            save_lora(root, folder / LORA_NAME)
        if full:
            root.save_pretrained(folder)
            add_to_config(folder, {"dtype": _dtype_of_weights(root)})
            if processor is not None:
                processor.save_pretrained(folder)
            elif source is not None:
                _copy_beside(source, None if local is not None else manifest.base_revision, folder)
            if not any(folder.glob(PROCESSORS)):
                logger.warning("%s has no processor: put it there with processor.save_pretrained(%r)", out, str(out))
        for weights in folder.rglob("*.safetensors"):  # which safetensors lets nobody else read
            shutil.copymode(next(weights.parent.glob("*config.json")), weights)

    licence = licence_of(source) if source is not None else {}
    return _write(out, manifest, context_tokens_of(model), force, own_files, licence)


def record_fidelity(folder: Path, fidelity: Mapping[str, Any]) -> None:
    """Write what was measured against dense into an artefact's manifest and card; each file is replaced at once.

    Raises:
        ArtefactError: The folder is not a valid artefact.
    """
    manifest, _ = read_artefact(folder)
    _write_manifest(folder, replace(manifest, fidelity=fidelity), licence_of(folder))


def _local(source: str | Path | None) -> Path | None:
    return Path(source).resolve() if source is not None and os.path.isdir(source) else None


def _on_hub(config: Any) -> str | None:
    """The Hub's id of what a model was loaded from, if it was loaded from there."""
    return config._name_or_path if getattr(config, "_commit_hash", None) is not None else None


def _nowhere(source: str | None) -> str:
    """What keeps a model's source from being named, and what to do."""
    if source is None:
        return "was not loaded from anywhere: restore it, call model.save_pretrained(folder), and load it from there"
    return (
        f"was loaded from {source!r}, which is neither a folder (seen from here) nor a model of the Hub: set "
        "model.config._name_or_path to the folder"
    )


def _dtype_of_weights(root: PreTrainedModel) -> str:
    """As transformers names a model's type after its first parameter, which context tokens are in some families."""
    from gazepatch.patch import context_tokens_of

    tokens = context_tokens_of(root)
    own = (held for held in root.parameters() if held is not tokens and held.is_floating_point())
    return str(next(own).dtype).removeprefix("torch.")


def _copy_beside(source: str, revision: str | None, folder: Path) -> None:
    """Copy what belongs beside a model's weights, if it is where the model was loaded and not in `folder` already."""
    try:
        origin = fetch(source, only=[*BESIDE, *LICENCES], revision=revision).path
    except GazeError as error:  # the weights, which may have been trained for long, are saved all the same
        logger.warning("the processor of %s cannot be had: %s", source, error)
        return
    copy_files(origin, folder, sorted(name for name in files_beside(origin) if not (folder / name).exists()))


def _write(
    out: Path,
    manifest: Manifest,
    tokens: Tensor | None,
    force: bool,
    own_files: Callable[[Path], None] | None = None,
    licence: Mapping[str, Any] | None = None,
) -> Path:
    with complete_folder(out) as folder:
        if own_files is not None:
            own_files(folder)
        if manifest.full:
            add_to_config(folder, {"gaze": manifest.gaze.to_dict()})
            geometry = processor_geometry(str(folder))
            manifest = replace(manifest, processor_geometry=geometry, key_layout=key_layout(folder))
        if tokens is not None:
            write_context_tokens(folder / TOKENS_NAME, tokens, manifest.model_type)
        _write_manifest(folder, manifest, licence or {})
        read_artefact(folder)  # what cannot be read back is not handed out
        check_output(out, None, force)  # again: somebody may have put something there meanwhile
    return out


def _write_manifest(folder: Path, manifest: Manifest, licence: Mapping[str, Any]) -> None:
    text, card = manifest.to_json(), card_of(manifest, licence, (folder / LORA_NAME).is_dir())
    replace_file(folder / FILE_NAME, text)
    replace_file(folder / CARD_NAME, card)
