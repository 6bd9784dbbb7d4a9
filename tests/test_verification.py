"""What `verify` promises, notices and refuses."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest
import torch
from tiny import Case, tiny
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError, UnsupportedModelError
from gazepatch.patch import is_patched, patched
from gazepatch.running.attention import GazeAttention
from gazepatch.timing import bench
from gazepatch.verification import check_finite, verify

SMALL = GazeConfig(region=(3, 3, 1), window=None, budget=0.25, min_visual_tokens=0)


@pytest.fixture
def case() -> Case:
    return tiny("llava")


def test_verify_knows_what_half_precision_costs(case: Case) -> None:
    case.model.to(torch.bfloat16)
    inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(torch.bfloat16)}
    with patched(case.model, SMALL):
        report = verify(case.model, inputs)
        assert is_patched(case.model)
    assert report.passed, report


def test_verify_notices_harm(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = GazeAttention.decode
    monkeypatch.setattr(GazeAttention, "decode", lambda *arguments: decode(*arguments) * 1.01)
    failed = {check.name for check in verify(case.model, case.inputs).checks if not check.passed}
    assert failed == {"dense equivalence", "cached equals uncached"}


@pytest.mark.parametrize(("harm", "calls"), [(1.5, range(100)), (1.5, range(12, 16)), (float("nan"), [8])])
def test_verify_notices_harm_in_half_precision(
    case: Case, monkeypatch: pytest.MonkeyPatch, harm: float, calls: Container[int]
) -> None:
    case.model.to(torch.bfloat16)
    inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(torch.bfloat16)}
    decode, steps = GazeAttention.decode, []

    def harmed(*arguments: Any) -> Tensor:
        steps.append(decode(*arguments))
        return steps[-1] * (harm if len(steps) - 1 in calls else 1.0)  # two a step, the first four at full budget

    monkeypatch.setattr(GazeAttention, "decode", harmed)
    failed = {check.name for check in verify(case.model, inputs).checks if not check.passed}
    assert failed == {"cached equals uncached"} | ({"dense equivalence"} if 0 in calls else set())


def test_verify_refuses_what_it_cannot_check(case: Case) -> None:
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ConfigError, match="expected inputs with at least one image, got none"):
        verify(case.model, text)
    assert not is_patched(case.model)
    with (
        patched(case.model, SMALL),
        pytest.raises(
            ConfigError, match="got none that did, so that both sides do the same: give inputs with at least"
        ),
    ):
        bench(case.model, text, new_tokens=2)
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        verify(case.model, case.inputs, steps=0)
    with patched(inner := case.model.model, SMALL):
        for checking in (verify, bench):
            with pytest.raises(UnsupportedModelError, match="expected a model that generates tokens, got a LlavaModel"):
                checking(inner, case.inputs)
        assert is_patched(inner)


def test_verify_of_a_model_in_training_mode(case: Case) -> None:
    with torch.random.fork_rng():
        case.model.config.get_text_config().attention_dropout = 0.5
        for layer in case.model.get_decoder().layers:
            layer.self_attn.attention_dropout = 0.5
        with pytest.raises(ConfigError, match=r"in training mode may: call model\.eval\(\)"):
            verify(case.model.train(), case.inputs)


def test_verify_blames_no_model_for_what_it_does_unpatched() -> None:
    case = tiny("qwen2_vl")  # numbers what follows an image that ends the prompt by whether there is a cache
    stop, length = case.spans[-1].stop, case.inputs["input_ids"].shape[1]
    ends = {k: v[:, :stop] if v.dim() == 2 and v.shape[1] == length else v for k, v in case.inputs.items()}
    with patched(case.model, SMALL), pytest.raises(ConfigError, match=r"unpatched, the model differs by .*text"):
        verify(case.model, ends)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_cannot_be_compared(broken: float) -> None:
    fine, bad = torch.ones(2, 3), torch.tensor([1.0, broken])
    check_finite(fine, fine)
    with pytest.raises(ConfigError, match=r"from the model dense, in torch\.float32: load it with another dtype"):
        check_finite(bad, fine)
    with pytest.raises(ConfigError, match=r"from the model with gaze, in torch\.bfloat16"):
        check_finite(fine, bad.to(torch.bfloat16))
