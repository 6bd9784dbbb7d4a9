"""Artefacts: folders of a few kilobytes that turn a base model into a gazing one. Made, saved and loaded here."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.card import model_card
from gazepatch.config import GazeConfig
from gazepatch.errors import ArtefactError
from gazepatch.manifest import FILE_NAME, Manifest, read

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CARD_NAME = "README.md"
TOKENS_NAME = "context_tokens.safetensors"

#: Folder of the LoRA adapters, if any.
LORA_NAME = "lora"

#: The base model of an artefact that brings its own, as its manifest names it: a folder inside the artefact's.
OWN_MODEL = "./model"

# Arguments of from_pretrained that say how the Hub is reached: they hold for the artefact and for its base model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    config: GazeConfig | None = None,
    context_tokens: Tensor | str | Path | None = None,
    force: bool = False,
) -> Path:
    """Make an artefact for a model, from its `config.json` alone: no weights are read.

    Args:
        source: Local folder or Hub id of a vision-language model. It is never written to.
        out: Folder to write; it must not exist yet.
        config: Settings, by default `GazeConfig()`.
        context_tokens: Trained context tokens, as for `gazepatch.apply`.
        force: Replace `out` if it is an artefact already, once the new one is complete.

    Returns:
        The folder, as an absolute path.

    Raises:
        UnsupportedModelError: The architecture has no adapter, or no layer of it can gaze.
        ArtefactError: `source` is not a model, the context tokens are not for it, or `out` cannot be written.
    """
    from gazepatch.context import with_context_tokens
    from gazepatch.registry import adapter_for

    model_config = base_config(source)
    text = adapter_for(model_config.model_type).text_config(model_config)
    gaze, tokens = with_context_tokens(
        config or GazeConfig(), context_tokens, model_config.model_type, text.hidden_size
    )
    return _write(model_config, str(source), gaze, tokens, Path(out), force)


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
        out: Folder to write; it must not exist yet.
        full: Write the model's own weights as well, into `out/model`, which the artefact then names as its base model.
        processor: With `full`, what belongs into that folder besides.
        provenance: How it was trained, for `gaze_config.json`: anything that JSON can hold.
        force: Replace `out` if it is an artefact already, once the new one is complete.

    Raises:
        PatchError: The model is not patched.
        ArtefactError: It was not loaded from anywhere, or `out` cannot be written.
    """
    from gazepatch.lora import has_lora, save_lora
    from gazepatch.patch import context_tokens_of, patch_of, root_model

    root = root_model(model)
    settings, config = patch_of(model).config, root.config
    if full and has_lora(root):
        raise ArtefactError("a full artefact has no LoRA adapters beside it: merge them into the model first")

    def further(folder: Path) -> None:
        if has_lora(root):
            save_lora(root, folder)
        for part in (root, processor) if full else ():
            if part is not None:
                part.save_pretrained(folder / OWN_MODEL)

    if not (source := getattr(config, "_name_or_path", "") or OWN_MODEL * full):
        raise ArtefactError(
            "an artefact names its base model, and this one was not loaded from anywhere: "
            "restore it, call model.save_pretrained(folder), and load it from there"
        )
    return _write(config, source, settings, context_tokens_of(model), Path(out), force, provenance, full, further)


def load(
    path_or_repo: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load the base model of an artefact and patch it.

    Args:
        path_or_repo: Artefact folder, or Hub id of one.
        base: Where to load the base model from instead of the place the artefact names.
        revision: Commit, branch or tag of the artefact on the Hub. The base model has its own, in the artefact.
        **from_pretrained_kwargs: Passed on to `AutoModelForImageTextToText.from_pretrained`.

    Raises:
        ArtefactError: The artefact is damaged, or does not fit the base model.
    """
    from transformers import AutoModelForImageTextToText

    from gazepatch.lora import load_lora
    from gazepatch.patch import apply

    hub = {name: from_pretrained_kwargs[name] for name in HUB_ARGUMENTS if name in from_pretrained_kwargs}
    folder = artefact_folder(path_or_repo, revision, **hub)
    manifest = read(folder)
    tokens = _tokens_of(folder, manifest)
    source, at = base_of(manifest, base, folder)
    # Before the weights, so that a wrong model costs no download.
    manifest.check(base_config(source, revision=at, **hub))
    model = AutoModelForImageTextToText.from_pretrained(source, revision=at, **from_pretrained_kwargs)
    manifest.check(model.config)
    if (manifest.provenance or {}).get("trainable") == "lora" and not (folder / LORA_NAME).is_dir():
        raise ArtefactError(f"{folder} must hold the folder {LORA_NAME} that was trained with it: get it again")
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
    """The local folder of an artefact, downloading the artefact's own files if it is a Hub id."""
    if os.path.exists(path_or_repo):
        return Path(path_or_repo)
    from huggingface_hub import snapshot_download

    wanted = [FILE_NAME, CARD_NAME, TOKENS_NAME, f"{LORA_NAME}/*", f"{Path(OWN_MODEL).name}/*"]
    try:
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=wanted, **hub))
    except Exception as error:
        raise ArtefactError(
            f"expected the folder or the Hub id of an artefact, got {str(path_or_repo)!r}, "
            f"{_found(path_or_repo)}: {_one_line(error)}"
        ) from error


def base_of(manifest: Manifest, base: str | Path | None = None, folder: Path | None = None) -> tuple[str, str | None]:
    """Where to load the base model of an artefact in `folder` from: folder or Hub id, and revision."""
    if base is not None and str(base) != manifest.base_model:
        return str(base), None
    if os.path.isabs(manifest.base_model) and not os.path.isdir(manifest.base_model):
        raise ArtefactError(
            f"base model folder {manifest.base_model} not found: it was moved, or the artefact was made on another "
            "machine; say where the model is with gazepatch.load(..., base=...)"
        )
    if manifest.base_model == OWN_MODEL and folder is not None:
        return str(folder / OWN_MODEL), None
    return manifest.base_model, manifest.base_revision


def base_config(source: str | Path, **kwargs: Any) -> Any:
    """The transformers configuration of a model with an adapter, by folder or Hub id.

    Raises:
        UnsupportedModelError: There is no adapter for its model type.
        ArtefactError: There is no such model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    from gazepatch.registry import adapter_for

    try:
        values, _ = PreTrainedConfig.get_config_dict(str(source), **kwargs)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"expected the folder or the Hub id of a model, got {str(source)!r}, {_found(source)}: {_one_line(error)}"
        ) from error
    if not values:  # transformers is content with a folder without config.json
        raise ArtefactError(f"expected the folder or the Hub id of a model, got {str(source)!r}, without config.json")
    # Our own error first: transformers refuses types that it does not know itself with one about itself.
    adapter_for(str(values.get("model_type")))
    return AutoConfig.from_pretrained(str(source), **kwargs)


def _write(
    config: Any,
    source: str,
    gaze: GazeConfig,
    tokens: Tensor | None,
    out: Path,
    force: bool,
    provenance: Mapping[str, Any] | None = None,
    full: bool = False,
    further: Callable[[Path], None] | None = None,
) -> Path:
    from gazepatch.context import write_context_tokens
    from gazepatch.patch import gaze_layers
    from gazepatch.registry import adapter_for

    gaze_layers(adapter_for(config.model_type), config, gaze)  # refuses settings under which no layer gazes
    local = Path(source).resolve() if os.path.isdir(source) else None
    out = out.absolute()
    check_output(out, local, force)
    manifest = replace(Manifest.of(config, gaze, str(local or source)), provenance=provenance)
    if full:
        manifest = replace(manifest, base_model=OWN_MODEL, base_revision=None)
    with _complete_folder(out) as folder:
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        (folder / CARD_NAME).write_text(model_card(manifest), encoding="utf-8")
        if tokens is not None:
            write_context_tokens(folder / TOKENS_NAME, tokens, config.model_type)
        if further is not None:
            further(folder)
        _tokens_of(folder, read(folder))  # what cannot be read back is not handed out
    return out


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


def check_output(out: Path, source: Path | None, force: bool) -> None:
    """Refuse to write over anything but an artefact, and into or over the base model at all."""
    if source is not None and (source == (real := out.resolve()) or source in real.parents or real in source.parents):
        raise ArtefactError(f"out must lie outside the base model, which is never touched; got {out} and {source}")
    if not os.path.lexists(out):
        return
    if not force:
        raise ArtefactError(
            f"{out} exists already: choose another name, or force=True (--force) to replace an artefact"
        )
    if out.is_symlink() or not (out / FILE_NAME).is_file():
        raise ArtefactError(f"{out} is no artefact folder, so it is not replaced even by force: remove it yourself")


@contextmanager
def _complete_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    new, old = (out.with_name(f".{out.name}.{kind}-{uuid.uuid4().hex[:8]}") for kind in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _found(source: str | Path) -> str:
    return "a damaged model" if os.path.exists(source) else "which is no folder, and the Hub does not give it"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
