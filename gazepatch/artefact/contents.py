"""What lies in an artefact's folder: its own files, checked to be whole, and the rest, which is never published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gazepatch.artefact.checkpoint import (
    CONFIG_NAME,
    TEMPLATES,
    checkpoint_files,
    config_values,
    is_checkpoint_file,
    key_layout,
)
from gazepatch.artefact.manifest import CARD_NAME, FILE_NAME, LORA_NAME, Manifest, read
from gazepatch.context import TOKENS_NAME, read_context_tokens
from gazepatch.errors import ArtefactError

if TYPE_CHECKING:
    from torch import Tensor

_LORA = {f"{LORA_NAME}/adapter_config.json", f"{LORA_NAME}/adapter_model.safetensors"}
_LORA_EXTRA = f"{LORA_NAME}/generation_config.json"  # transformers saves it with them, nobody reads it
_ADAPTER = {FILE_NAME, CARD_NAME, TOKENS_NAME, *_LORA, _LORA_EXTRA}


@dataclass(frozen=True)
class Contents:
    """The content of an artefact's folder.

    Attributes:
        manifest: Its `gaze_config.json`.
        files: Its own files, with `/` between folders, and their sizes in bytes.
        left_out: What is not the artefact's: files, and folders with a `/` at their end.
    """

    manifest: Manifest
    files: Mapping[str, int]
    left_out: tuple[str, ...]


def read_artefact(folder: Path) -> tuple[Manifest, Tensor | None]:
    """The manifest and the context tokens of an artefact folder, checked as far as they can be without the model.

    Raises:
        ArtefactError: Something is damaged, or does not belong to the rest.
    """
    manifest = read(folder)
    _check_settings(folder, manifest)
    return manifest, _tokens_of(folder, manifest)


def contents_of(folder: Path) -> Contents:
    """Look through an artefact's folder, an adapter or a full checkpoint.

    Raises:
        ArtefactError: A file is missing, damaged, or a link to somewhere else.
    """
    manifest, _ = read_artefact(folder)
    try:
        return _contents_of(folder, manifest)
    except OSError as error:
        raise ArtefactError(f"{folder} cannot be read: {error}") from error


def may_be_replaced(path: str) -> bool:
    """Whether an artefact's file may have this name: one of an older artefact must not stay beside a new one."""
    return path in _ADAPTER or is_checkpoint_file(path)


def _check_settings(folder: Path, manifest: Manifest) -> None:
    """Refuse a full artefact whose `config.json`, if it is there, has other settings than its manifest."""
    path = folder / CONFIG_NAME
    if manifest.full and path.is_file() and config_values(path).get("gaze") != manifest.gaze.to_dict():
        raise ArtefactError(
            f"the settings in {path} differ from those in {FILE_NAME}, as if files of two artefacts had been mixed: "
            "get a new copy, or make it again"
        )


def _tokens_of(folder: Path, manifest: Manifest) -> Tensor | None:
    """The context tokens of an artefact, as many as its settings say."""
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


def _contents_of(folder: Path, manifest: Manifest) -> Contents:
    required = {FILE_NAME, CARD_NAME}
    if manifest.gaze.context_tokens:
        required.add(TOKENS_NAME)
    if (manifest.provenance or {}).get("trainable") == "lora" or (folder / LORA_NAME).exists():
        required |= _LORA
    if manifest.full:
        manifest.check_files({}, key_layout(folder))
        required |= {CONFIG_NAME, *(name.as_posix() for name in checkpoint_files(folder))}

    files: dict[str, int] = {}
    left_out = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (name in required or name == _LORA_EXTRA):
            files[name] = path.stat().st_size
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ArtefactError(f"{path} is a link to a file outside of the folder: put the file itself there")
        else:
            left_out.append(f"{name}/" if path.is_dir() else name)
    if missing := sorted(required - files.keys()):
        raise ArtefactError(f"{folder} must hold {', '.join(missing)}: the artefact is incomplete, make it again")
    return Contents(manifest, files, tuple(left_out))


def _walk(folder: Path, below: str = "") -> Iterator[Path]:
    """In the order of their names: files, and folders in which an artefact has nothing, unopened."""
    for path in sorted((folder / below).iterdir()):
        name = path.relative_to(folder).as_posix()
        if name in (LORA_NAME, TEMPLATES) and path.is_dir() and not path.is_symlink():
            yield from _walk(folder, name)
        else:
            yield path
