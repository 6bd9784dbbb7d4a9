"""What lies in an artefact's folder: its own files, checked to be whole, and the rest, which is never published."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gazepatch.artefact import CARD_NAME, LORA_NAME, OWN_MODEL, TOKENS_NAME
from gazepatch.errors import ArtefactError
from gazepatch.manifest import FILE_NAME, Manifest, read

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_TEMPLATES = "additional_chat_templates"
_LORA = {f"{LORA_NAME}/adapter_config.json", f"{LORA_NAME}/adapter_model.safetensors"}
_LORA_EXTRA = f"{LORA_NAME}/generation_config.json"  # transformers saves it with them, nobody reads it
_ADAPTER = {FILE_NAME, CARD_NAME, TOKENS_NAME, *_LORA, _LORA_EXTRA}
_WEIGHTS = (WEIGHTS_NAME, INDEX_NAME, "model-*.safetensors")
_LICENCES = ("LICENSE*", "NOTICE*")

# What transformers writes beside the weights of a model. Code is not among it.
_MODEL = (
    CONFIG_NAME,
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*.json",
    "*.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    f"{_TEMPLATES}/*.jinja",
)

#: Where a full artefact keeps the model: in its own folder, or in one inside.
_MODEL_FOLDERS = ("", f"{Path(OWN_MODEL).name}/")


@dataclass(frozen=True)
class Contents:
    """The content of an artefact's folder.

    Attributes:
        manifest: Its `gaze_config.json`.
        full: Whether it brings the weights of a model.
        files: Its own files, with `/` between folders, and their sizes in bytes.
        left_out: What is not the artefact's: files, and folders with a `/` at their end.
    """

    manifest: Manifest
    full: bool
    files: Mapping[str, int]
    left_out: tuple[str, ...]


def contents_of(folder: Path) -> Contents:
    """Look through an artefact's folder, an adapter or a full checkpoint.

    Raises:
        ArtefactError: A file is missing, damaged, or a link to somewhere else.
    """
    manifest = read(folder)
    try:
        return _contents_of(folder, manifest)
    except OSError as error:
        raise ArtefactError(f"{folder} cannot be read: {error}") from error


def may_be_replaced(path: str) -> bool:
    """Whether an artefact's file may have this name: one of an older artefact must not stay beside a new one."""
    names = [path.removeprefix(folder) for folder in _MODEL_FOLDERS]
    return path in _ADAPTER or any(_matches(name, (*_MODEL, *_WEIGHTS)) for name in names)


def _contents_of(folder: Path, manifest: Manifest) -> Contents:
    required, model = {FILE_NAME, CARD_NAME}, _model_folder(folder, manifest)
    if manifest.gaze.context_tokens or (folder / TOKENS_NAME).exists():
        required.add(TOKENS_NAME)
    if (manifest.provenance or {}).get("trainable") == "lora" or (folder / LORA_NAME).exists():
        required |= _LORA
    if model is not None:
        required |= {f"{model}{name}" for name in (CONFIG_NAME, *_weights(folder / model))}

    files: dict[str, int] = {}
    left_out = []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        of_model = model is not None and name.startswith(model) and _matches(name[len(model) :], (*_MODEL, *_LICENCES))
        if path.is_file() and (name in required or name == _LORA_EXTRA or of_model):
            files[name] = path.stat().st_size
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ArtefactError(f"{path} is a link to a file outside of the folder: put the file itself there")
        else:
            left_out.append(f"{name}/" if path.is_dir() else name)
    if missing := sorted(required - files.keys()):
        raise ArtefactError(f"{folder} must hold {', '.join(missing)}: it is no whole artefact, make it again")
    _check_tensors(folder, manifest, files)
    return Contents(manifest, model is not None, files, tuple(left_out))


def _walk(folder: Path, below: str = "") -> Iterator[Path]:
    """In the order of their names: files, and folders in which an artefact has nothing, unopened."""
    for path in sorted((folder / below).iterdir()):
        name = path.relative_to(folder).as_posix()
        ours = name in (LORA_NAME, Path(OWN_MODEL).name) or path.name == _TEMPLATES
        if ours and path.is_dir() and not path.is_symlink():
            yield from _walk(folder, name)
        else:
            yield path


def _model_folder(folder: Path, manifest: Manifest) -> str | None:
    """Which of `_MODEL_FOLDERS` holds the model of a full artefact."""
    if manifest.base_model == OWN_MODEL:
        return _MODEL_FOLDERS[1]
    return "" if (folder / CONFIG_NAME).exists() else None


def _weights(folder: Path) -> set[str]:
    """The files with the weights of a model, by its index if it has more than one."""
    if (folder / WEIGHTS_NAME).exists() or not (folder / INDEX_NAME).exists():
        return {WEIGHTS_NAME}
    return {INDEX_NAME, *_weight_map(folder / INDEX_NAME).values()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not entries or not all(isinstance(name, str) for name in entries.values()):
            raise ValueError("weight_map must name a file for every tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{path} must be the index of a model's weights: {error!r}; make the artefact again"
        ) from None
    return dict(entries)


def _check_tensors(folder: Path, manifest: Manifest, files: Mapping[str, int]) -> None:
    """Every file of tensors intact, and none missing among them, by their headers alone."""
    expected, found = manifest.gaze.context_tokens, 0
    held: dict[str, set[str]] = {}
    for name in files:
        if name == TOKENS_NAME:
            from gazepatch.context import read_context_tokens

            found = len(read_context_tokens(folder / name, manifest.model_type, manifest.hidden_size))
        elif name.endswith(".safetensors"):
            held.setdefault(name.rpartition("/")[0], set()).update(_tensor_names(folder / name))
    if found != expected:
        raise ArtefactError(
            f"{folder / TOKENS_NAME} must hold {expected} context tokens, as {FILE_NAME} says, got {found}"
        )
    for name in (name for name in files if name.endswith(INDEX_NAME)):
        if missing := sorted(_weight_map(folder / name).keys() - held[name.rpartition("/")[0]]):
            raise ArtefactError(f"{folder / name} names tensors that none of its files holds, such as {missing[0]}")


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ArtefactError(f"{path} is no intact safetensors file: {error}; make the artefact again") from None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """As a shell matches: `*` does not reach into other folders."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
