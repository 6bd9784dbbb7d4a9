"""Training with context tokens: losses and gradients, adapters of PEFT, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from contexts import GAZE, assert_close, context
from stepping import WHOLE
from tiny import CORE, Case, batch, text, tiny
from torch import Tensor, nn

import gazepatch
from gazepatch import UnsupportedModelError
from gazepatch.patch import apply, context_tokens_of, patched, restore
from gazepatch.verification import _uncached, generate_logits


@pytest.fixture
def case() -> Case:
    return tiny("llava")


@pytest.mark.parametrize("name", CORE)
def test_loss_is_the_cross_entropy_of_the_logits(name: str) -> None:
    case = batch(tiny(name))
    labels = case.inputs["input_ids"].masked_fill(case.inputs["attention_mask"] == 0, -100)
    with patched(case.model, GAZE, context_tokens=context()):
        output = case.model(**case.inputs, labels=labels, use_cache=False)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.logits.shape[:2] == labels.shape
    torch.testing.assert_close(output.loss, expected)


def test_it_gets_a_gradient(case: Case) -> None:
    apply(case.model, GAZE, context_tokens=context())
    case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    gradient = context_tokens_of(case.model).grad
    assert gradient.isfinite().all() and (gradient.abs().amax(-1) > 0).all()
    with torch.no_grad():
        context_tokens_of(case.model)[1, 2] += 1e-2
        more = case.model(**case.inputs, labels=case.inputs["input_ids"]).loss
        context_tokens_of(case.model)[1, 2] -= 2e-2
        less = case.model(**case.inputs, labels=case.inputs["input_ids"]).loss
    assert abs((more - less) / 2e-2 - gradient[1, 2]) < 1e-2 * gradient.abs().max()


# ---- PEFT


@pytest.mark.parametrize("first", ["peft", "patch"])
def test_lora(case: Case, first: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, init_lora_weights=False)

    def applied(model: Any) -> Any:
        return apply(model, GAZE, context_tokens=context())

    torch.manual_seed(5)
    wrapped = (
        applied(peft.get_peft_model(case.model, settings))
        if first == "peft"
        else peft.get_peft_model(applied(case.model), settings)
    )
    held = context_tokens_of(wrapped)
    assert any(p is held for p in wrapped.parameters())
    wrapped(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
    assert any("lora_A" in name for name in trained)
    # PEFT freezes what it finds; what is added later is not frozen.
    assert (held.grad is not None) == (first == "peft")
    with torch.no_grad():
        cached, tokens = generate_logits(wrapped, case.inputs, 2)
        assert_close(cached, _uncached(wrapped, case.inputs, tokens))
    restore(wrapped)
    assert not any("gaze" in name for name, _ in wrapped.named_parameters())


# ---- gradient checkpointing


@contextmanager
def checkpointing(model: Any, reentrant: bool) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def test_an_answer_in_the_middle_of_a_training() -> None:
    case = tiny("llava")
    with checkpointing(case.model.train(), reentrant=False):
        answer = case.model.generate(**case.inputs, max_new_tokens=4)
        with patched(case.model, WHOLE):
            assert torch.equal(case.model.generate(**case.inputs, max_new_tokens=4), answer)


def test_a_decoder_whose_layers_alone_say_that_they_are_checkpointed() -> None:
    case = tiny("nemotron_h_omni")
    model, labels = case.model.train(), case.inputs["input_ids"]
    with patched(model, GAZE):
        model(**case.inputs, labels=labels, use_cache=False).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with checkpointing(model, reentrant=False):
            model(**case.inputs, labels=labels).loss.backward()
    assert len(expected) > 10
    for name, gradient in expected.items():
        assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("kind", [transformers.StableLmConfig, transformers.NemotronConfig])
def test_layers_that_hand_nothing_on_cannot_be_checkpointed(case: Case, kind: type) -> None:
    config = transformers.LlavaConfig(vision_config=case.model.config.vision_config, text_config=text(kind))
    config.image_token_index = case.model.config.image_token_index
    model = transformers.LlavaForConditionalGeneration(config).train()
    with checkpointing(model, reentrant=False), patched(model, GAZE):
        with pytest.raises(UnsupportedModelError, match=r"call model\.gradient_checkpointing_disable\(\)"):
            model(**case.inputs)
        model.gradient_checkpointing_disable()
        model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", [*CORE, "internvl_short", "gemma3_short"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    case = batch(tiny(name))
    model = case.model.train()
    labels = case.inputs["input_ids"].masked_fill(case.inputs["attention_mask"] == 0, -100)

    def gradients(weights: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**case.inputs, labels=labels).loss.backward()
        return [w.grad.clone() for w in weights]

    def weights() -> list[Tensor]:
        own = [context_tokens_of(model)] if gazepatch.is_patched(model) else []
        return [*own, *(p for name, p in model.named_parameters() if "q_proj.weight" in name and "vision" not in name)]

    expected = gradients(weights())
    with checkpointing(model, reentrant):
        for one, other in zip(gradients(weights()), expected, strict=True):
            assert_close(one, other)
    with patched(model, GAZE, context_tokens=context()):
        expected = gradients(weights())
        with checkpointing(model, reentrant):
            found = gradients(weights())
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
