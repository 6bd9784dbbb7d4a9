"""What a command is asked, images and a prompt, and what there is to say of what was read of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gazepatch.cli.settings import Command

if TYPE_CHECKING:
    from PIL.Image import Image

    from gazepatch.answering import Answer


def number_option(flag: str, default: int, help_text: str, minimum: int = 1) -> Callable[[Command], Command]:
    """An option that takes a whole number of at least `minimum`."""
    return click.option(
        flag, default=default, show_default=True, type=click.IntRange(min=minimum), metavar="N", help=help_text
    )


max_new_tokens_option = number_option("--max-new-tokens", 128, "Where an answer is cut off.")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def check_prompt(images: Sequence[str], prompt: str) -> None:
    """Refuse an image in the prompt's place, there or not, and what is no text: a usage error."""
    if os.path.isfile(prompt):
        raise click.UsageError(f"PROMPT is missing: {prompt} is a file", click.get_current_context())
    if any("\udc80" <= letter <= "\udcff" for letter in prompt):  # which stand for bytes that Python could not decode
        raise click.UsageError(
            f"expected PROMPT in the encoding of this terminal, {sys.getfilesystemencoding()}, got bytes that are not: "
            "if they are UTF-8, set PYTHONUTF8=1",
            click.get_current_context(),
        )
    if not images and prompt.lower().endswith(IMAGE_SUFFIXES):
        raise click.UsageError(
            f"PROMPT is missing, and there is no file {prompt}: give an image that exists, then the prompt. If that is "
            "the prompt, end it with a question mark or a full stop",
            click.get_current_context(),
        )


def images_and_prompt(given: Sequence[str], default: str) -> tuple[list[str], str]:
    """`[IMAGE... PROMPT]` apart; every image is a file."""
    *images, prompt = given or (default,)
    check_prompt(images, prompt)
    for image in images:
        click.Path(exists=True, dir_okay=False).convert(image, None, click.get_current_context())
    return images, prompt


def open_images(paths: Sequence[str]) -> list[Image]:
    """The images in some files, to be opened before any weights are read. A file that holds none is a usage error."""
    from gazepatch.pictures import read_picture

    opened = []
    for path in paths:
        try:
            opened.append(read_picture(path))
        except ValueError as error:
            raise click.UsageError(f"{path} cannot be read as an image: {error}", click.get_current_context()) from None
    return opened


def entries_read(given: Answer, images: Sequence[Any], dense: bool = False) -> str:
    """How much of the images was read for an answer, in words."""
    if not images:
        return "no images to read"
    if dense:
        return "all visual entries read"
    if given.read_share is None:
        return "nothing read after the prompt"
    return f"{given.read_share:.1%} of the visual entries read"


def say_notes(patched: Any, inputs: Mapping[str, Any]) -> None:
    """Say what of these inputs is not as one might expect: images that are read whole, say."""
    from gazepatch.inspection import inspect

    for note in inspect(patched, inputs).notes:
        click.echo(f"[{note}]")
