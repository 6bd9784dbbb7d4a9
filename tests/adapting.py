"""Adapters of PEFT on tiny models; tests of LoRA run where there is a PEFT that is new enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import Case

import gazepatch
from gazepatch import GazeConfig
from gazepatch.lora import missing_peft

needs_peft = pytest.mark.skipif(bool(missing_peft()), reason=f"LoRA needs {missing_peft()}")

SETTINGS = GazeConfig(region=(3, 3, 1), budget=0.5, min_visual_tokens=0, prefill="gaze", context_tokens=2)


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return transformers.AutoModelForImageTextToText.from_pretrained(folder)


def patched(model: Any) -> Any:
    return gazepatch.apply(model, SETTINGS, context_tokens=torch.randn(2, 64))


def trained(model: Any) -> Any:
    """Every parameter that learns is moved."""
    with torch.no_grad():
        for held in model.parameters():
            if held.requires_grad:
                held += 0.1 * torch.randn_like(held)
    return model


@torch.no_grad()
def logits(model: Any, case: Case) -> torch.Tensor:
    return model.eval()(**case.inputs).logits
