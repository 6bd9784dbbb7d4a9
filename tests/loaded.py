"""What tests ask of a model that was loaded from an artefact."""

from __future__ import annotations

from typing import Any

import torch
from tiny import Case

import gazepatch
from gazepatch import GazeConfig


def assert_gazes_like(case: Case, model: Any, settings: GazeConfig) -> None:
    """The loaded model has these settings, and writes and reads what the case's own model does under them."""
    assert gazepatch.inspect(model).settings == settings
    with gazepatch.patched(case.model, settings):
        expected = case.model.generate(**case.inputs, max_new_tokens=6, do_sample=False)
        share = gazepatch.stats(case.model).read_share
    assert torch.equal(model.generate(**case.inputs, max_new_tokens=6, do_sample=False), expected)
    assert gazepatch.stats(model).read_share == share < 1
