"""What fails half-way leaves the model as it was: exceptions in apply, in forwards, in blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from patching import SMALL
from tiny import Case
from torch import nn
from transformers import DynamicCache

from gazepatch.errors import CacheError
from gazepatch.patch import apply, dense, patched, restore
from gazepatch.running import changes
from gazepatch.verification import fingerprint, generate_logits


def test_patched_restores_after_an_exception(ran: Case) -> None:
    before = fingerprint(ran.model)
    with pytest.raises(ZeroDivisionError), patched(ran.model, SMALL):
        raise ZeroDivisionError
    assert fingerprint(ran.model) == before


def test_an_exception_inside_a_forward_leaves_the_model_usable(ran: Case) -> None:
    apply(ran.model, SMALL)
    expected = generate_logits(ran.model, ran.inputs, 2)[0]
    decoder = ran.model.model.language_model

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with (hook := decoder.layers[1].register_forward_pre_hook(fail)) and pytest.raises(ZeroDivisionError):
        ran.model(**ran.inputs)
    hook.remove()
    assert torch.equal(generate_logits(ran.model, ran.inputs, 2)[0], expected)


def test_an_interrupted_step_is_forgotten(ran: Case) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    dense_logits = ran.model(**ran.inputs).logits
    cache = DynamicCache()
    with torch.no_grad(), patched(ran.model, SMALL):
        ran.model(**ran.inputs, past_key_values=cache)
        hook = ran.model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            ran.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        hook.remove()
        with dense(ran.model):
            assert torch.equal(ran.model(**ran.inputs).logits, dense_logits)
        with pytest.raises(CacheError, match="failed half-way"):
            ran.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_an_exception_inside_apply_leaves_the_model_as_it_was(ran: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(ran.model)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(ran.model.model.language_model), "register_forward_hook", fail)
    with pytest.raises(MemoryError):
        apply(ran.model, SMALL)
    monkeypatch.undo()
    assert fingerprint(ran.model) == before


def test_restore_does_without_context_tokens_that_somebody_removed(ran: Case) -> None:
    before = fingerprint(ran.model)
    apply(ran.model, SMALL, context_tokens=torch.ones(2, 64))
    del ran.model.get_decoder().gaze_context_tokens
    restore(ran.model)
    assert fingerprint(ran.model) == before


@pytest.mark.parametrize("failing", range(4))
def test_a_failure_at_any_change_leaves_the_model_as_it_was(
    ran: Case, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, put, done = fingerprint(ran.model), changes.set_attribute, itertools.count()

    def fail(*args: Any) -> None:
        put(*args)
        if next(done) == failing:
            raise MemoryError

    monkeypatch.setattr(changes, "set_attribute", fail)
    with pytest.raises(MemoryError):
        apply(ran.model, SMALL, context_tokens=torch.ones(2, 64))
    monkeypatch.undo()
    assert fingerprint(ran.model) == before


def test_context_tokens_that_cannot_be_put_there_leave_the_model_as_it_was(
    ran: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(ran.model)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(nn.Module, "register_parameter", fail)
    with pytest.raises(MemoryError):
        apply(ran.model, SMALL, context_tokens=torch.ones(2, 64))
    monkeypatch.undo()
    assert fingerprint(ran.model) == before
