"""Tiny models generating, with caches of all kinds and compiled steps: settings, calls, and what to compare."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tiny import Case, tiny
from torch import Tensor
from transformers import Cache, CompileConfig, StaticCache

from gazepatch.config import GazeConfig
from gazepatch.patch import patched, stats

WHOLE = GazeConfig(region=(3, 3, 1), window=(1, 3, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = dataclasses.replace(WHOLE, budget=0.25)
SETTINGS = {
    "whole": WHOLE,
    "quarter": QUARTER,
    "periphery": dataclasses.replace(QUARTER, periphery=True, head_reduce="none"),
    "gaze prefill": dataclasses.replace(QUARTER, prefill="gaze"),
    "few visual tokens": dataclasses.replace(QUARTER, min_visual_tokens=10**6),
}


def compiled(backend: Any = "eager") -> dict[str, Any]:
    """What `generate` compiles its steps by, on CPU too."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generate(case: Case, steps: int = 6, **settings: Any) -> Any:
    length = {"max_new_tokens": steps, "min_new_tokens": steps}
    kept = {"return_dict_in_generate": True, "output_logits": True}
    return case.model.generate(**{**case.inputs, **length, **kept, **settings})


def said(case: Case, steps: int = 6, **settings: Any) -> Tensor:
    """The prompt and what the model says to it."""
    return generate(case, steps, **settings).sequences


def static(case: Case, length: int = 300) -> StaticCache:
    return StaticCache(config=case.model.config, max_cache_len=length)


def supported(name: str) -> Case:
    """A tiny model, if this transformers can give it a static cache without a patch."""
    case = tiny(name)
    try:
        generate(case, 2, cache_implementation="static")
    except IndexError:  # gemma3 in 5.16: the masks of its images are shorter than the cache
        pytest.skip(f"transformers {transformers.__version__} itself cannot make {name} a static cache")
    return case


def image_turn(case: Case) -> dict[str, Tensor]:
    """Another image, of the kind the case's prompt has, with text around it."""
    first = case.spans[0]
    image = case.inputs["input_ids"][:, first.start : first.stop]
    text = torch.tensor([[21, 22, 23]])
    return {
        "input_ids": torch.cat([text, image, text], 1),
        "pixel_values": torch.randn_like(case.inputs["pixel_values"][:1]),
    }


def longer(case: Case, tokens: int) -> dict[str, Tensor]:
    """The prompt with so many more tokens of text after it."""
    inputs = dict(case.inputs)
    for name, more in (("input_ids", torch.arange(11, 11 + tokens)), ("attention_mask", torch.ones(tokens).long())):
        inputs[name] = torch.cat([inputs[name], more.expand(len(inputs[name]), -1)], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, tokens))
    return inputs


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def assert_statistics_of_copies(case: Case, prefix: Cache) -> None:
    """Steps on copies of a cache that has the prompt are counted each for itself."""
    with patched(case.model, QUARTER):
        case.model(**case.inputs, past_key_values=prefix)
        for steps in (1, 2):
            twin = copy.deepcopy(prefix)
            for _ in range(steps):
                case.model(input_ids=torch.tensor([[5]]), past_key_values=twin)
            assert stats(case.model).steps == steps and 0 < stats(case.model).read_share < 1
