"""What gaze saves on the user's own machine, model and picture: the time of a token, unpatched and with gaze."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gazepatch.answering import ONE_ANSWER
from gazepatch.errors import ConfigError
from gazepatch.patch import generating_model, restored, stats


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds.

    Attributes:
        prompt_ms, dense_prompt_ms: Milliseconds until the first token, with gaze and unpatched.
        token_ms, dense_token_ms: Milliseconds for each further token.
        speedup: How many times faster a token is with gaze: median of the rounds' ratios.
        speedup_min, speedup_max: The smallest and the largest of these ratios.
        prompt_tokens: Length of the prompt.
        read_share: Share of the visual entries that gaze read.
        rounds, new_tokens: How much was measured.
    """

    prompt_ms: float
    dense_prompt_ms: float
    token_ms: float
    dense_token_ms: float
    speedup: float
    speedup_min: float
    speedup_max: float
    prompt_tokens: int
    read_share: float
    rounds: int
    new_tokens: int


def bench(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Timing:
    """Time `generate` with the unpatched model and with gaze, in turn, so that both see the same machine.

    Args:
        model: The patched model; it is left as it was. Caches that it has filled cannot be used any more.
        inputs: What a processor returns for it, with at least one image.
        new_tokens: Tokens to generate each time.
        rounds: How often, after one round that is not counted.
        progress: Called with the rounds done and those there are.

    Raises:
        PatchError: The model is not patched.
        UnsupportedModelError: It has no `generate`.
        ConfigError: There is nothing to measure: no image, no round, or no token after the first.
    """
    if new_tokens < 2 or rounds < 1:
        raise ConfigError(f"expected new_tokens >= 2 and rounds >= 1, got {new_tokens} and {rounds}")
    gazed, whole = [], []
    for done in range(rounds + 1):
        with restored(model):
            whole.append(_prompt_and_token(model, inputs, new_tokens))
        gazed.append(_prompt_and_token(model, inputs, new_tokens))
        if not stats(model).visual_entries:
            raise ConfigError(
                "expected tokens that read an image, got none that did, so that both sides do the same: give inputs "
                "with at least one image"
            )
        if progress is not None:
            progress(done + 1, rounds + 1)
    gazed, whole = gazed[1:], whole[1:]
    ratios = [theirs[1] / ours[1] for ours, theirs in zip(gazed, whole, strict=True)]
    (prompt, token), (dense_prompt, dense_token) = (
        [1e3 * statistics.median(column) for column in zip(*runs, strict=True)] for runs in (gazed, whole)
    )
    return Timing(
        prompt_ms=prompt,
        dense_prompt_ms=dense_prompt,
        token_ms=token,
        dense_token_ms=dense_token,
        speedup=statistics.median(ratios),
        speedup_min=min(ratios),
        speedup_max=max(ratios),
        prompt_tokens=inputs["input_ids"].shape[1],
        read_share=stats(model).read_share,
        rounds=rounds,
        new_tokens=new_tokens,
    )


@torch.no_grad()
def _prompt_and_token(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> tuple[float, float]:
    """Seconds for the first token and for each further one."""
    root = generating_model(model)
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if root.device.type == "cuda":
            torch.cuda.synchronize(root.device)
        marks.append(time.perf_counter())

    settings = {**ONE_ANSWER, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "stop_strings": None}
    mark()
    handle = root.register_forward_hook(mark)
    try:
        root.generate(**inputs, **settings)
    finally:
        handle.remove()
    return marks[1] - marks[0], (marks[-1] - marks[1]) / (len(marks) - 2)
