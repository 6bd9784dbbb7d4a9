"""Two models around one configuration object, which transformers does not copy: one of them is patched."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny import Case, tiny
from torch import Tensor

import gazepatch
from gazepatch.config import GazeConfig
from gazepatch.errors import PatchError

SMALL = GazeConfig(region=(3, 3, 1), window=None, budget=0.25, min_visual_tokens=0, prefill="gaze")


@torch.no_grad()
def logits(model: torch.nn.Module, case: Case) -> Tensor:
    return model(**case.inputs).logits


def test_the_other_model_is_dense_and_outlives_the_patched_one() -> None:
    case, patched = tiny("llava"), tiny("llava").model
    other = type(patched)(patched.config).eval()
    dense, implementation = logits(other, case), other.config.text_config._attn_implementation
    gazepatch.apply(patched, SMALL)
    assert torch.equal(logits(other, case), dense) and not torch.equal(logits(patched, case), dense)
    with pytest.raises(PatchError, match="is patched already"):
        gazepatch.apply(other, SMALL)
    del patched
    gc.collect()
    assert torch.equal(logits(other, case), dense)
    assert other.config.text_config._attn_implementation == implementation
    gazepatch.apply(other, SMALL)
