"""The demo's typeface: each word piece of a tokenizer is a glyph of 4 x 4 black or white pixels, its number in bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gazepatch.errors import GazeError

if TYPE_CHECKING:
    from PIL.Image import Image

GLYPH_PX = 4
BITS = GLYPH_PX * GLYPH_PX


def bits(token: int) -> list[int]:
    """The pixels of a glyph in raster order: 1 for white, 0 for black."""
    if not 0 <= token < 2**BITS:
        raise GazeError(f"a glyph holds a token id below {2**BITS}, got {token}")
    return [token >> i & 1 for i in range(BITS)]


def print_page(tokens: Sequence[int], side: int, blank: int) -> Image:
    """A square page of `side` x `side` glyphs, line by line, with `blank` tokens to the end."""
    from PIL import Image

    if len(tokens) > side * side:
        raise GazeError(f"the page has room for {side * side} tokens, got {len(tokens)}")
    page = Image.new("RGB", (side * GLYPH_PX, side * GLYPH_PX))
    for place, token in enumerate([*tokens, *[blank] * (side * side - len(tokens))]):
        top, left = place // side * GLYPH_PX, place % side * GLYPH_PX
        for i, bit in enumerate(bits(token)):
            page.putpixel((left + i % GLYPH_PX, top + i // GLYPH_PX), (255 * bit,) * 3)
    return page
