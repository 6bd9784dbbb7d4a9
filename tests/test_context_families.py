"""Context tokens in every family that takes them: a cache gives the logits of one forward without a cache."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, Case, batch, built
from torch import Tensor
from transformers import DynamicCache

from gazepatch.config import GazeConfig
from gazepatch.patch import patched
from gazepatch.registry import adapter_for
from gazepatch.verification import _uncached, generate_logits

GAZE = GazeConfig(region=(3, 3, 2), window=(3, 1, 1), budget=0.3, prefill="gaze", min_visual_tokens=0)
#: Float32 at logits of scale 5. Unpatched models differ by up to a third of it between the two, and these two magnify
#: rounding more than others (to 2e-7 in float64).
LIMITS = {"gemma4_unified": 2e-4, "granite4_vision": 2e-4}
LIMIT = 4e-5


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    made = built(request.param)
    config = made.model.config
    if reason := adapter_for(config.model_type).context_reason(config):
        pytest.skip(f"takes none: {reason}")
    return made


def context(case: Case, count: int) -> Tensor:
    hidden = case.model.config.get_text_config(decoder=True).hidden_size
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(count))


def assert_close(case: Case, actual: Tensor, expected: Tensor) -> None:
    error, scale = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item() / 5)
    limit = LIMITS.get(case.model.config.model_type, LIMIT)
    assert error <= limit * scale, f"differs by {error:.2e} at scale {scale:.1f}"


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 4), (1, 16), (2, 4)], ids=str)
@torch.no_grad()
def test_an_answer(case: Case, rows: int, count: int) -> None:
    made = case if rows == 1 else batch(case)
    if made.inputs["attention_mask"].min() == 0 and made.model.config.get_text_config().model_type == "mistral4":
        pytest.skip("without a cache this decoder scales its queries by places that count the padding, unpatched too")
    with patched(made.model, GAZE, context_tokens=context(made, count)):
        cached, tokens = generate_logits(made.model, made.inputs, 2)
        assert_close(made, cached, _uncached(made.model, made.inputs, tokens))


def asked_again(case: Case) -> tuple[Tensor, Tensor]:
    """Logits of the answer to a second question on one cache, and those of a forward over all of it."""
    cache = DynamicCache(config=case.model.config.get_text_config(decoder=True))
    prompt = case.inputs["input_ids"].shape[1]
    first = case.model.generate(**case.inputs, max_new_tokens=2, past_key_values=cache)
    longer = torch.cat([first, torch.tensor([[11, 12, 13]])], 1)
    second = case.model.generate(
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        max_new_tokens=2,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(second.logits, 1), _uncached(case.model, case.inputs, second.sequences[:, prompt:])[:, -2:]


@torch.no_grad()
def test_a_second_question(case: Case) -> None:
    with patched(case.model, GAZE, context_tokens=context(case, 4)):
        assert_close(case, *asked_again(case))
