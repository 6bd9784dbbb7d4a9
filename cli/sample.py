"""A prompt to try a model with when nobody brings one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "Describe this image."
SIDE_PX = 448


def sample_image() -> Image:
    """Colours and edges everywhere, so that no two patches look alike."""
    from PIL import Image

    image = Image.new("RGB", (SIDE_PX, SIDE_PX))
    for y in range(SIDE_PX):
        for x in range(SIDE_PX):
            image.putpixel((x, y), (x * 255 // SIDE_PX, y * 255 // SIDE_PX, x * y // 7 % 256))
    return image
