"""Models, processors and prompts as the commands take them: names and files in, model and inputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gazepatch.cli.output import quiet
from gazepatch.cli.settings import config_from
from gazepatch.config import GazeConfig

if TYPE_CHECKING:
    from PIL.Image import Image


base_option = click.option(
    "--base", metavar="MODEL", help="Where the base model of MODEL, an adapter artefact, is now: a folder or Hub id."
)


def open_model(source: str, reading: Mapping[str, Any] | None = None, base: str | None = None) -> tuple[Any, Any]:
    """A patched model with its processor: an artefact with its own settings, any other model with the defaults.

    Args:
        source: Local folder or Hub id.
        reading: Settings that were given in the place of these, by `reading_options`.
        base: Where the base model of an adapter is, in the place of where it says, by `base_option`.
    """
    import gazepatch
    from gazepatch.artefact.finding import artefact_folder, base_config, base_of, is_artefact
    from gazepatch.artefact.manifest import read
    from gazepatch.artefact.weights import load_model
    from gazepatch.patch import context_tokens_of, patch_of
    from gazepatch.processors import open_processor

    given = {name: value for name, value in (reading or {}).items() if value is not None}
    settings = config_from(given, GazeConfig())
    quiet()
    check_base_option(source, base)
    # Bad settings, an unknown architecture and a missing processor are refused before any weights are read.
    whose, revision = source, None
    if ours := is_artefact(source):
        folder = artefact_folder(source)
        whose, revision = base_of(read(folder), folder, base)
    base_config(whose, revision=revision)
    processor = open_processor(whose, revision)
    if ours:
        model: Any = gazepatch.load(source, base=base)
        if given:
            settings, tokens = config_from(given, patch_of(model).config), context_tokens_of(model)
            gazepatch.apply(gazepatch.restore(model), settings, context_tokens=tokens)
    else:
        model = gazepatch.apply(load_model(source), settings)
    return model.to(device()), processor


def check_base_option(source: str, base: str | None) -> None:
    """Refuse `--base` for what has weights of its own: a usage error."""
    from gazepatch.artefact.finding import is_artefact
    from gazepatch.artefact.manifest import FILE_NAME, read
    from gazepatch.hub.fetching import fetch

    if base is None or (is_artefact(source) and not read(fetch(source, file=FILE_NAME).path.parent).full):
        return
    raise click.UsageError(
        f"--base goes with an adapter, an artefact without weights of its own, which {source} is not",
        click.get_current_context(),
    )


def device() -> str:
    """Where the commands put a model."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prompt_inputs(model: Any, processor: Any, images: Sequence[Image], prompt: str) -> Any:
    """The model's inputs for one question about images, by its own chat template."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device)
