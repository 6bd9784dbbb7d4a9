"""What a training asks of a model, of every family: logits where they are needed, and peace where nothing learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny
from torch import nn

import gazepatch
from gazepatch import GazeConfig
from gazepatch.registry import adapter_for
from gazepatch.training.chat import IGNORED, supervised
from gazepatch.training.trained import Trained
from gazepatch.training.trainer import logits_at

PAPER = GazeConfig.paper(region=(2, 2, 1), context_tokens=2)


def floats(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_where_they_are_needed(name: str) -> None:
    case = tiny(name)
    labels = case.inputs["input_ids"].clone()
    labels[:, :-4] = IGNORED
    columns, kept, _ = supervised(labels)
    expected = case.model(**case.inputs, use_cache=False).logits[:, columns][kept]
    torch.testing.assert_close(logits_at(case.model, case.inputs, columns, kept), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_pixels_get_the_type_of_a_model_in_half_precision(name: str) -> None:
    case = tiny(name)
    model = case.model.to(torch.bfloat16)
    try:
        model(**floats(case.inputs, torch.bfloat16))
    except RuntimeError as error:
        pytest.skip(f"this tiny model itself cannot: {error}")
    if adapter_for(model.config.model_type).context_reason(model.config) is None:
        tokens = nn.Parameter(gazepatch.initial_context_tokens(model, 2).float())  # as in a training
        gazepatch.apply(model, PAPER, context_tokens=tokens)
    labels = case.inputs["input_ids"].clone()
    columns, kept, tokens = supervised(labels)
    assert logits_at(model, floats(case.inputs, torch.float32), columns, kept).shape[0] == len(tokens)


@pytest.mark.parametrize("name", ["emu3", "granite4_vision", "qianfan_ocr"])
def test_what_does_not_learn_stays_as_it_is(name: str) -> None:
    case = tiny(name)
    tokens = nn.Parameter(gazepatch.initial_context_tokens(case.model, 2))
    gazepatch.apply(case.model, PAPER, context_tokens=tokens)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    trained = Trained(case.model, "context", lora_rank=1)
    with torch.no_grad():
        reading = case.model(**case.inputs, use_cache=False).logits
    trained.learn(case.model)
    learning = case.model(**case.inputs, use_cache=False).logits
    torch.testing.assert_close(learning, reading, atol=1e-4, rtol=1e-4)
    learning.sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().max() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
