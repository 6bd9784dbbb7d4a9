"""Pictures: read from files, cut to what a grid of visual tokens covers, and written into pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest side of a picture in a page, in pixels.
MAX_PX = 1024


def read_picture(file: str | Path | BinaryIO) -> Image:
    """The picture in a file, in RGB, upright: cameras note which side is up, and transformers turns it too.

    Raises:
        ValueError: It cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            decoded: Image.Image = ImageOps.exif_transpose(opened).convert("RGB")
            return decoded
    # Each of its decoders has errors of its own: those of AVIF and DDS are RuntimeErrors.
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def as_seen(image: Image, image_processor: Any) -> Image:
    """The part of `image` that the model gets, in the image's own pixels; black where there is padding.

    For processors that make one square of an image. They pad it to a square, around it (LLaVA, where that is set) or
    after it (Llama 3.2 Vision), or resize it and cut out the centre (CLIP), or leave it whole.
    """
    width, height = image.size
    named = type(image_processor).__name__
    if named.startswith("LlavaImageProcessor") and getattr(image_processor, "do_pad", False):
        return _centre(image, max(image.size), max(image.size))
    if named.startswith("MllamaImageProcessor"):
        return image.crop((0, 0, max(image.size), max(image.size)))
    crop = getattr(image_processor, "crop_size", None)
    if not (getattr(image_processor, "do_center_crop", False) and crop):
        return image
    size = getattr(image_processor, "size", None) or {}
    across = down = 1.0  # what the image is resized by
    if getattr(image_processor, "do_resize", True):
        if shortest := size.get("shortest_edge"):
            across = down = shortest / min(width, height)
        elif size.get("height") and size.get("width"):
            across, down = size["width"] / width, size["height"] / height
    return _centre(image, round(crop["width"] / across), round(crop["height"] / down))


def data_url(image: Image) -> str:
    """A PNG to be written into a page, made smaller where it is large."""
    small = image.convert("RGB")
    small.thumbnail((MAX_PX, MAX_PX))
    png = io.BytesIO()
    small.save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _centre(image: Image, width: int, height: int) -> Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
