"""One answer of a model, with its cost: what it read and how long each token took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StopStringCriteria, TextStreamer

from gazepatch.errors import ConfigError
from gazepatch.patch import is_patched, stats

#: Arguments of `generate` for one greedy answer, whatever the model's generation config says. Without a cache nothing
#: gazes.
ONE_ANSWER: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}


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

    Raises:
        ConfigError: The model's generation config has stop strings that cannot be found with this tokenizer.
    """
    streamer = _TimedStreamer(tokenizer, show)
    began = time.perf_counter()
    settings = {**ONE_ANSWER, "max_new_tokens": max_new_tokens, **generate_kwargs}
    with torch.no_grad():
        out = model.generate(**inputs, **_stopping(model, tokenizer), **settings, streamer=streamer)
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


def _stopping(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What `generate` needs for the stop strings of the model's generation config, if it has any."""
    strings = getattr(model.generation_config, "stop_strings", None)
    if not strings:
        return {}
    try:
        return {"stopping_criteria": [StopStringCriteria(tokenizer, strings)], "stop_strings": None}
    except ValueError as error:  # of tokenizers whose words transformers cannot put together
        raise ConfigError(
            f"expected stop_strings in the model's generation config that its tokenizer can write, got {strings!r}, at "
            f"which transformers says {str(error)!r}: take them out of generation_config.json"
        ) from error


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
