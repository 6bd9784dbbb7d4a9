"""How closely gaze follows dense, as a card says it."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny

from gazepatch.artefact.fidelity import checks_of, measure_fidelity
from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError
from gazepatch.patch import is_patched, patched
from gazepatch.verification import Check, Verification, generate_logits

CONFIG = GazeConfig(region=(3, 3, 1), window=None, budget=1.0, periphery=False, min_visual_tokens=0)


def test_a_small_image_gazes_all_the_same() -> None:
    case = tiny("llava")
    with patched(case.model, CONFIG, budget=0.1, min_visual_tokens=10**6, context_tokens=torch.randn(2, 64)):
        found = measure_fidelity(case.model, case.inputs, steps=2)
        assert is_patched(case.model)
    assert found["read_share"] < 0.5 and found["min_visual_tokens"] == 0 and found["divergence"] > 1e-9


def test_logits_that_are_no_numbers_are_refused() -> None:
    case = tiny("llava")
    case.model.get_decoder().norm.weight.data.fill_(float("nan"))
    with patched(case.model, CONFIG), pytest.raises(ConfigError, match="got NaN or infinity from the model dense"):
        measure_fidelity(case.model, case.inputs, steps=2)


def test_what_json_cannot_say_of_a_check_is_none() -> None:
    checks = [Check("one", math.nan, 0.5, ""), Check("two", 0.25, 0.5, "")]
    of_card = {"one": {"measured": None, "limit": 0.5}, "two": {"measured": 0.25, "limit": 0.5}}
    assert checks_of(Verification(checks)) == of_card


@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_an_answer_that_would_have_ended(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny("llava")
    likely = generate_logits(case.model, case.inputs, 3)[0].argmax(-1)[0].tolist()
    monkeypatch.setattr(case.model.generation_config, "eos_token_id", likely[1])
    with patched(case.model, CONFIG, budget=budget):
        found = measure_fidelity(case.model, case.inputs, steps=4)
    assert found["steps"] == 4 and found["divergence"] >= 0
    if budget == 1.0:
        assert found["agreement"] == found["read_share"] == 1.0 and found["divergence"] < 1e-9
    else:
        assert found["read_share"] < 0.5 and found["divergence"] > 1e-9
