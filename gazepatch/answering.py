"""One answer of a model, with its cost: what it read and how long each token took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from gazepatch.patch import is_patched, stats


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: The answer without special tokens.
        tokens: Its token ids.
        first_token_s: Seconds until the first token: images, prompt and all.
        per_token_s: Seconds for each further token; None when there was no further one.
        read_share: Share of the visual entries that the routed steps read; None without any image.
    """

    text: str
    tokens: list[int]
    first_token_s: float
    per_token_s: float | None
    read_share: float | None


def answer(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    show: Callable[[str], None] | None = None,
    **generate_kwargs: Any,
) -> Answer:
    """Generate greedily.

    Args:
        model: Patched or not.
        tokenizer: The model's.
        inputs: What the model's processor returns for one prompt.
        max_new_tokens: Longest answer.
        show: Gets the text piece by piece while it is made.
        **generate_kwargs: Passed on to `generate`.
    """
    streamer = _TimedStreamer(tokenizer, show)
    began = time.perf_counter()
    # Whatever the model's generation config says: one answer, and a cache, without which nothing gazes.
    settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    settings |= {"max_new_tokens": max_new_tokens, **generate_kwargs}
    with torch.no_grad():
        # Where there are stop strings, they are looked for in the words of the tokenizer.
        out = model.generate(**inputs, **settings, streamer=streamer, tokenizer=tokenizer)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    made = streamer.times[1:]  # the first one is the prompt's
    counted = stats(model) if is_patched(model) else None
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tokens=tokens,
        first_token_s=made[0] - began,
        per_token_s=(made[-1] - made[0]) / (len(made) - 1) if len(made) > 1 else None,
        read_share=counted.read_share if counted is not None and counted.visual_entries else None,
    )


class _TimedStreamer(TextStreamer):
    """Notes when each token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.show is not None:
            self.show(text)
