"""What only the pattern of the tokens tells: rows between break tokens, or runs without any grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazepatch.adapters.base import CONVOLUTIONS, FULL_ONLY, Adapter, Captured, Declared, hybrid_reasons
from gazepatch.layout import Span, runs


class Rows(Declared):
    """Fuyu: every row of an image is a run, with a break token after it, and nothing says how many rows there are."""

    def _locate(self, config: Any, modality: str, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        rows = [runs(self.positions(config, modality, of_row)) for of_row in ids]
        return [span for row, of_row in enumerate(rows) for span in _images(of_row, row)]


def _images(rows: Sequence[tuple[int, int]], row: int) -> list[Span]:
    """Rows with a single token between them are an image, whose grid is known if they are equally long."""
    images: list[list[tuple[int, int]]] = []
    for start, stop in rows:
        before = images[-1][-1] if images else None
        if before is not None and start == before[1] + 1:
            images[-1].append((start, stop))
        else:
            images.append([(start, stop)])
    spans: list[Span] = []
    for number, of_image in enumerate(images):
        first, last, lengths = of_image[0][0], of_image[-1][1], {stop - start for start, stop in of_image}
        if len(lengths) == 1:
            spans.append(Span(row, first, last, (1, len(of_image), lengths.pop()), number, row_gap=1))
        else:
            spans += [Span(row, start, stop, None, number) for start, stop in of_image]
    return spans


class Queries(Declared):
    """Learned queries have read the image: their features have no place in it."""

    grid = False


class Inkling(Queries):
    """Patches of an image whose size nothing tells. Layers of full attention have short convolutions beside it."""

    def dense_reasons(self, config: Any) -> dict[int, str]:
        return hybrid_reasons(self.text_config(config))


ADAPTERS: tuple[Adapter, ...] = (
    Rows(("fuyu",), images="any size, rows with break tokens"),
    Queries(("aria", "idefics2", "deepseek_ocr2"), images="learned queries"),
    Inkling(("inkling_mm_model",), images="patches in one run", layers=FULL_ONLY, no_context=CONVOLUTIONS),
)
