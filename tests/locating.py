"""What an adapter finds in a tiny model's prompts, and which of them there are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import CORE, FAMILIES, VIDEO, Case, type_of

from gazepatch.adapters.base import Adapter
from gazepatch.layout import Span
from gazepatch.registry import adapter_for

CASES = [(name, False) for name in FAMILIES] + [(name, True) for name in VIDEO]
#: Those whose images are tokens of the sequence.
IN_SEQUENCE = [(name, video) for name, video in CASES if not adapter_for(type_of(name)).cross_attention]
IDS, SEQUENCE_IDS = ([f"{name}-video" if video else name for name, video in some] for some in (CASES, IN_SEQUENCE))
CORE_IDS = [name for name in IDS if name.removesuffix("-video") in CORE]
core_case = pytest.mark.parametrize("case", [(n, v) for n, v in CASES if n in CORE], ids=CORE_IDS, indirect=True)
every_case = pytest.mark.parametrize("case", CASES, ids=IDS, indirect=True)
every_sequence = pytest.mark.parametrize("case", IN_SEQUENCE, ids=SEQUENCE_IDS, indirect=True)

Captured = dict[str, dict[str, Any]]


@contextmanager
def capturing(model: Any) -> Iterator[Captured]:
    """The arguments of the outermost call of either feature function, by name."""
    captured: Captured = {}
    inside: list[str] = []
    base = model.base_model

    def wrapped(modality: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                bound = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
                captured[modality] = {**bound, **bound.pop("kwargs", {})}
            inside.append(modality)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    names = {m: f"get_{m}_features" for m in ("image", "video") if hasattr(base, f"get_{m}_features")}
    for modality, name in names.items():
        setattr(base, name, wrapped(modality, getattr(base, name)))
    try:
        yield captured
    finally:
        for name in names.values():
            delattr(base, name)


@torch.no_grad()
def captured_by(case: Case, call: Callable[..., Any], **settings: Any) -> Captured:
    if adapter_of(case).cross_attention:  # its forward encodes the images itself
        return {"image": case.inputs}
    with capturing(case.model) as captured:
        call(**case.inputs, **settings)
    return dict(captured)


def id_lists(case: Case) -> list[list[int]]:
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    return ids.masked_fill(mask == 0, -1).tolist()


def adapter_of(case: Case) -> Adapter:
    return adapter_for(case.model.config.model_type)


def located(case: Case, captured: Mapping[str, Any]) -> list[Span]:
    return adapter_of(case).locate(case.model.config, id_lists(case), captured)
