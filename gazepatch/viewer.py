"""The gaze viewer: a trace and its pictures as one HTML page that needs nothing from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from gazepatch.answering import Answer
from gazepatch.pictures import as_seen, data_url
from gazepatch.tracing import Trace

if TYPE_CHECKING:
    from PIL.Image import Image

#: Where the template wants its data.
PLACE = "__TRACE__"


def answer_trace(answer: Answer, trace: Trace, tokenizer: Any) -> dict[str, Any]:
    """An answer and its trace in what JSON can hold: `Trace.to_dict` with tokens in the place of steps.

    Each of the `tokens` has its `id`, `text`, `read_share` and `layers`, those of the step that made it. The first one
    comes from the prompt, whose queries are not traced, as does every one of a text without visual tokens: there the
    last two are null.
    """
    traced = trace.to_dict()
    steps = traced.pop("steps")
    untraced = {"read_share": None, "layers": None}
    of_tokens = [untraced] * (len(answer.tokens) - len(steps)) + steps
    texts = _texts(tokenizer, answer.tokens)
    tokens = [
        {"id": number, "text": text} | step for number, text, step in zip(answer.tokens, texts, of_tokens, strict=True)
    ]
    return {"text": answer.text, "read_share": answer.read_share, **traced, "tokens": tokens}


def render(traced: Mapping[str, Any], pictures: Sequence[Image], image_processor: Any) -> str:
    """The page for what `answer_trace` gives.

    Args:
        traced: With `model` and `prompt` added, which are shown where they are there.
        pictures: The images of the prompt, in their order.
        image_processor: What made the model's inputs of them.
    """
    data = {**traced, "panels": _panels(traced["spans"], pictures, image_processor)}
    # The only thing that goes into the page: no text can end the element it stands in, and the script sets text only.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("gazepatch").joinpath("viewer.html").read_text(encoding="utf-8")
    return template.replace(PLACE, text)


def _texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text: by itself it would often lose the space before it."""
    texts, before = [], ""
    for count, token in enumerate(tokens, 1):
        text = tokenizer.decode(tokens[:count], clean_up_tokenization_spaces=False)
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([token]))
        before = text.rstrip("\ufffd")  # characters of several tokens are whole with the last one
    return texts


def _panels(
    spans: Sequence[Mapping[str, Any]], pictures: Sequence[Image], image_processor: Any
) -> list[dict[str, Any]]:
    """What to draw: a picture with the grid that covers it, or a picture and then the grid of each tile or frame."""
    media = {span["media"] for span in spans}
    matched = len(media) == len(pictures)  # else crops count as images of their own
    panels: list[dict[str, Any]] = [] if matched else [_picture(i, image) for i, image in enumerate(pictures)]
    for number in sorted(media):
        own = [i for i, span in enumerate(spans) if span["media"] == number]
        alone = len(own) == 1 and spans[own[0]]["grid"] is not None and spans[own[0]]["grid"][0] == 1
        if matched and alone:
            panels.append(
                _picture(number, as_seen(pictures[number], image_processor)) | _grid(spans[own[0]], own[0], 0)
            )
            continue
        if matched:
            panels.append(_picture(number, pictures[number]))
        for i in own:
            frames = (spans[i]["grid"] or [1])[0]
            panels += [
                _named(spans[i], frame if frames > 1 else None) | _grid(spans[i], i, frame) for frame in range(frames)
            ]
    return panels


def _picture(number: int, image: Image) -> dict[str, Any]:
    return {"title": f"image {number + 1}", "url": data_url(image)}


def _grid(span: Mapping[str, Any], number: int, frame: int) -> dict[str, Any]:
    _, rows, columns = span["grid"] or (1, 1, span["stop"] - span["start"])
    return {"span": number, "frame": frame, "rows": rows, "columns": columns}


def _named(span: Mapping[str, Any], frame: int | None) -> dict[str, Any]:
    parts = [f"image {span['media'] + 1}"]
    if span["tile"] is not None:
        parts.append(f"tile {span['tile'] + 1}")
    if span["frame"] is not None or frame is not None:
        parts.append(f"frame {(span['frame'] or 0) + (frame or 0) + 1}")
    if span["grid"] is None:
        parts.append("grid not known, tokens in a row")
    return {"title": ", ".join(parts)}
