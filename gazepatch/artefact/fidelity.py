"""How closely a patched model follows the dense one on an input, for the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from gazepatch.patch import context_tokens_of, patch_of, patched, restored, root_model, stats
from gazepatch.verification import Verification, check_finite, generate_logits


@torch.no_grad()
def measure_fidelity(model: nn.Module, inputs: Mapping[str, Any], *, steps: int = 32) -> dict[str, Any]:
    """Let a patched model follow the tokens that it would write densely, and compare its guesses.

    However few visual tokens there are, it gazes: read whole, there would be nothing to compare.

    Args:
        model: The patched model.
        inputs: What a processor returns for it, with at least one image.
        steps: Tokens to write.

    Returns:
        `agreement`, the share of tokens that gaze would choose as well; `divergence`, the mean of
        `KL(dense || gaze)` in nats; `read_share` of the visual entries; `steps`, and what it was measured with.

    Raises:
        ConfigError: The model's logits are not finite.
    """
    settings, context_tokens = replace(patch_of(model).config, min_visual_tokens=0), context_tokens_of(model)
    with restored(model):
        whole, tokens = generate_logits(model, inputs, steps - 1)
        with patched(model, settings, context_tokens=context_tokens):
            gazed, _ = generate_logits(model, inputs, steps - 1, tokens)
            read_share = stats(model).read_share
    check_finite(whole, gazed)
    # In float32 the rounding of distributions that are nearly the same makes it negative.
    log_p, log_q = whole.double().log_softmax(-1), gazed.double().log_softmax(-1)
    return {
        # Not with the tokens themselves: `generate` suppresses the end of a short answer, and these go on after it.
        "agreement": (gazed.argmax(-1) == whole.argmax(-1)).float().mean().item(),
        "divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "read_share": read_share,
        "steps": steps,
        "min_visual_tokens": settings.min_visual_tokens,
        "dtype": str(root_model(model).dtype).removeprefix("torch."),
        "device": root_model(model).device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def checks_of(report: Verification) -> dict[str, Any]:
    """What `verify` found, for the same card: each promise with the value that was measured, and its limit.

    What is not finite becomes None: JSON has no word for it.
    """
    return {
        check.name: {"measured": check.value if math.isfinite(check.value) else None, "limit": check.limit}
        for check in report.checks
    }
