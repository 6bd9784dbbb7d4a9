"""Prompts with images in them: what a processor would hand to a model, and where each visual token is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gazepatch.layout import Grid, Span

PAD, BOS = 0, 1
IMAGE, VIDEO_TOKEN, START, END, BREAK, OTHER = 990, 991, 992, 993, 994, 995
VIDEO_START, VIDEO_END, AUDIO = 996, 997, 998
#: No words have these ids.
SPECIAL = range(970, 1000)


@dataclass(frozen=True)
class Piece:
    """One expected span: its token ids from the first visual token to the last one, and what the span says of them."""

    ids: Sequence[int]
    grid: Grid | None
    row_gap: int = 0
    tile: int | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt: its tokens (pieces and single ids) and what its processor hands to the model."""

    parts: Sequence[Piece | int]
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model with inputs for it and the spans they hold.

    Attributes:
        rows: The images or videos of each row of `inputs`.
        few, many: Rows for `batch`.
        extra: Further inputs, made from the token ids `[B, S]` and the rows.
        stacked: Inputs have a batch axis before that of the images (Idefics 3), padded with zeros.
        axes: Axis along which an input is joined, where it is not the first.
        fill: What an input is padded with, where it is not zero.
        among_keys: The spans, from the rows, of a family whose images are keys of cross-attention and no tokens.
    """

    model: Any = field(repr=False)
    rows: Sequence[Sequence[Media]]
    few: Sequence[Media] = ()
    many: Sequence[Media] = ()
    extra: Callable[[Tensor, Sequence[Sequence[Media]]], dict[str, Tensor]] = lambda ids, rows: {}
    stacked: bool = False
    axes: Mapping[str, int] = field(default_factory=dict)
    fill: Mapping[str, int] = field(default_factory=dict)
    among_keys: Callable[[Sequence[Sequence[Media]]], list[Span]] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


def square(h: int, w: int, t: int = 1, token: int = IMAGE, **names: int) -> Piece:
    """A grid whose tokens follow each other."""
    return Piece([token] * (t * h * w), (t, h, w), **names)


def lines(h: int, w: int, gap: int, **names: int) -> Piece:
    """A grid with the id `gap` between its rows."""
    return Piece(([IMAGE] * w + [gap]) * (h - 1) + [IMAGE] * w, (1, h, w), row_gap=1, **names)


def prompt(media: Sequence[Media], row: int, generator: torch.Generator) -> tuple[list[int], list[Span]]:
    """Token ids of one row, with a few words around each image, and the spans in it."""

    def words(count: int) -> list[int]:
        return torch.randint(3, 900, (count,), generator=generator).tolist()

    ids, spans = [BOS, *words(4)], []
    for number, item in enumerate(media):
        for part in item.parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            start, stop = len(ids), len(ids) + len(part.ids)
            spans.append(Span(row, start, stop, part.grid, number, part.tile, part.frame, part.row_gap))
            ids += part.ids
        ids += words(3)
    return ids + words(5), spans


def filled(case: Case) -> Case:
    """The case with `inputs` and `spans` made from its rows, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    prompts = [prompt(media, row, generator) for row, media in enumerate(case.rows)]
    longest = max(len(ids) for ids, _ in prompts)
    padded = [[PAD] * (longest - len(ids)) + ids for ids, _ in prompts]
    spans = [
        replace(span, start=span.start + longest - len(ids), stop=span.stop + longest - len(ids))
        for ids, of_row in prompts
        for span in of_row
    ]
    if case.among_keys is not None:
        spans = case.among_keys(case.rows)
    input_ids = torch.tensor(padded)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), **case.extra(input_ids, case.rows)}
    for name in {name for media in case.rows for item in media for name in item.inputs}:
        of_rows = [[item.inputs[name] for item in media if name in item.inputs] for media in case.rows]
        inputs[name] = joined(case, name, [of_row for of_row in of_rows if of_row])
    return replace(case, inputs=inputs, spans=spans)


def joined(case: Case, name: str, of_rows: Sequence[Sequence[Any]]) -> Any:
    """One input out of those of the images of every row."""
    everything = [part for of_row in of_rows for part in of_row]
    if isinstance(everything[0], list):
        return [item for part in everything for item in part]
    if name in case.axes:
        return torch.cat(everything, case.axes[name])
    fill = case.fill.get(name, 0)
    rows = [joined_with_padding(of_row, fill) for of_row in of_rows]
    return joined_with_padding([row[None] for row in rows] if case.stacked else rows, fill)


def joined_with_padding(tensors: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Concatenation on the first axis; the others are padded at the end to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    enlarged = [tensor.new_full((len(tensor), *largest), fill) for tensor in tensors]
    for room, tensor in zip(enlarged, tensors, strict=True):
        room[tuple(map(slice, tensor.shape))] = tensor
    return torch.cat(enlarged)


def batch(case: Case) -> Case:
    """The same model with two rows: the first with fewer images (or videos) than the second, and padded on the left."""
    return filled(replace(case, rows=(case.few or case.rows[0][:1], case.many or case.rows[0])))


def repeated(case: Case, times: int) -> Case:
    """Every row of a case so many times in a row, as beam search does; the pixels are those of the case."""
    rows = len(case.inputs["input_ids"])
    ids = {name: case.inputs[name].repeat_interleave(times, 0) for name in ("input_ids", "attention_mask")}
    spans = [
        replace(span, row=row * times + i)
        for row in range(rows)
        for i in range(times)
        for span in case.spans
        if span.row == row
    ]
    return replace(case, inputs={**case.inputs, **ids}, spans=spans)
