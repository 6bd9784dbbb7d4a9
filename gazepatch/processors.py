"""Processors: what makes a model's inputs of images and prompts, by its chat template."""

from __future__ import annotations

from typing import Any

from gazepatch.errors import ArtefactError


def open_processor(source: str, revision: str | None = None) -> Any:
    """The processor of a model.

    Args:
        source: Local folder or Hub id.
        revision: Commit, branch or tag on the Hub.

    Raises:
        ArtefactError: There is none that takes images and prompts.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision)
    except Exception as error:  # what its many classes raise where files or packages are missing
        todo = "" if isinstance(error, ImportError) else "; its processor's files must lie beside the model's"
        raise ArtefactError(
            f"the processor of {source} cannot be loaded: {' '.join(str(error).split())}{todo}"
        ) from error
    if lack := lack_of(processor, f"the processor of {source}"):
        raise ArtefactError(lack)
    return processor


def lack_of(processor: Any, name: str = "the processor") -> str | None:
    """What keeps a processor, called by `name`, from taking images and prompts, and what to do; None: nothing."""
    # transformers takes a tokenizer alone where there is no more.
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        return (
            f"expected a model with a processor for images and text, got one with a {type(processor).__name__} alone: "
            "the processor's files must lie beside the model's"
        )
    if not getattr(processor, "chat_template", None):
        return (
            f"{name} has no chat template, which says how a prompt reads: put a chat_template.jinja into the model's "
            "folder"
        )
    return None
