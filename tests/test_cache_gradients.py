"""Gaze caches that gradients go through, and those that are filled in inference mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from stepping import QUARTER, WHOLE
from tiny import Case, tiny
from torch import Tensor
from transformers import DynamicCache

from gazepatch.patch import patched


def gradients(case: Case, kept: Sequence[bool]) -> dict[str, Tensor]:
    """Of the logits of steps, after a prompt; `kept` says which of these forwards, the prompt first, have a graph."""
    case.model.zero_grad()
    cache, logits = DynamicCache(config=case.model.config), []
    for number, graph in enumerate(kept):
        inputs = {"input_ids": torch.tensor([[4 + number]])} if number else case.inputs
        with torch.set_grad_enabled(graph):
            logits.append(case.model(**inputs, past_key_values=cache).logits)
    torch.cat(logits[1:]).float().pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "kept",
    [(True,) * 4, (False, True, True, True), (False, False, True), (True, True, False, True)],
    ids=["from the prompt", "from the first step", "from the second step", "but for a step"],
)
@pytest.mark.parametrize("name", ["llava", "llava_latent"])
def test_gradients_of_several_steps(name: str, kept: Sequence[bool]) -> None:
    case = tiny(name)
    dense = gradients(case, kept)
    with patched(case.model, WHOLE):
        found = gradients(case, kept)
    assert found.keys() == dense.keys()
    for parameter, gradient in dense.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-3, atol=1e-6, msg=parameter)


def test_a_step_without_gradients_leaves_those_before_it() -> None:
    case = tiny("llava")
    case.model.requires_grad_(False)
    queries = [p for n, p in case.model.named_parameters() if "language_model" in n and "q_proj" in n]
    for parameter in queries:  # of the first layer: no key has a gradient, but the graph keeps them
        parameter.requires_grad_(True)
    with patched(case.model, QUARTER):
        cache = DynamicCache(config=case.model.config)
        with torch.no_grad():
            case.model(**case.inputs, past_key_values=cache)
        first = case.model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
        with torch.no_grad():
            case.model(input_ids=torch.tensor([[6]]), past_key_values=cache)
        first.sum().backward()
    assert all(parameter.grad is not None for parameter in queries)


@pytest.mark.parametrize("turn", [1, 2], ids=["steps", "another turn"])
def test_a_prompt_in_inference_mode_goes_on_outside_of_it(turn: int) -> None:
    case = tiny("llava")
    ids = torch.tensor([[5] * turn])
    with patched(case.model, QUARTER):
        caches = []
        for mode in (torch.inference_mode, torch.no_grad):
            cache = DynamicCache(config=case.model.config)
            with mode():
                case.model(**case.inputs, past_key_values=cache)
                case.model(input_ids=torch.tensor([[4]]), past_key_values=cache)
            caches.append(cache)
        with torch.no_grad():
            caches.append(copy.deepcopy(caches[0]))
            for _ in range(2):
                logits = [case.model(input_ids=ids, past_key_values=cache).logits for cache in caches]
                assert torch.equal(logits[0], logits[1]) and torch.equal(logits[2], logits[1])
