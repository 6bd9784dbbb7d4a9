"""A decode step over images that are keys of cross-attention layers: who sees them is asked once, not in every step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from crossing import CASES, FAR, QUARTER, close, plainly
from tiny import Case, built, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from gazepatch.caches.adoption import gaze_state
from gazepatch.caches.cross_attention import CrossLayer, CrossState
from gazepatch.patch import patched


class Answer:
    """An answer as `generate` gives it, step by step."""

    def __init__(self, case: Case) -> None:
        self.model, self.ids, self.cache = case.model, case.inputs["input_ids"], DynamicCache()
        self.kwargs: dict[str, Any] = {"use_cache": True, "past_key_values": self.cache}
        self.kwargs["cross_attention_mask"] = case.inputs["cross_attention_mask"]
        self.grow(case.model(**case.inputs, past_key_values=self.cache))

    def grow(self, output: Any) -> None:
        self.ids = torch.cat([self.ids, torch.full_like(self.ids[:, :1], 20)], 1)
        self.kwargs = self.model._update_model_kwargs_for_generation(output, self.kwargs, is_encoder_decoder=False)

    def step(self) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=1, **self.kwargs)
        output = self.model(**{**inputs, "input_ids": self.ids[:, -1:]})
        self.grow(output)
        return output.logits


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks of which somebody looked at the numbers."""
    show, masks = CrossState._show, []

    def noted(state: CrossState, mask: Tensor | None) -> bool:
        masks.append(mask)
        return show(state, mask)

    monkeypatch.setattr(CrossState, "_show", noted)
    return masks


@pytest.mark.parametrize("name", ["the last of two images", "different numbers of images"])
def test_generate_asks_for_the_prompt_and_for_the_first_step(name: str, asked: list[Tensor | None]) -> None:
    case = CASES[name]()
    with plainly(case.model, FAR):
        expected = case.model.generate(**case.inputs, max_new_tokens=6, min_new_tokens=6)
    with patched(case.model, FAR):
        for _ in range(2):
            asked.clear()
            assert torch.equal(case.model.generate(**case.inputs, max_new_tokens=6, min_new_tokens=6), expected)
            assert len(asked) == 2
    assert {"prepare_inputs_for_generation", "_update_model_kwargs_for_generation"}.isdisjoint(vars(case.model))


@torch.no_grad()
def test_another_mask_in_between_is_seen(asked: list[Tensor | None]) -> None:
    case = built("mllama")
    other = case.inputs["cross_attention_mask"][:, -1:].clone()
    other[:, :, 0] = 0

    def steps() -> Tensor:
        answer = Answer(case)
        logits = [answer.step() for _ in range(3)]
        second = Answer(case)  # on a cache of its own
        logits += [second.step(), answer.step()]
        mask = answer.kwargs["cross_attention_mask"].clone()
        mask[:, -1:] = other
        by_hand = {"input_ids": answer.ids[:, -1:], "past_key_values": answer.cache, "cross_attention_mask": mask}
        output = case.model(**by_hand)
        answer.grow(output)
        logits.append(output.logits)
        logits += [answer.step(), answer.step()]
        answer.kwargs["cross_attention_mask"] = answer.kwargs["cross_attention_mask"] * other
        logits += [answer.step(), answer.step(), second.step()]
        return torch.cat(logits)

    with plainly(case.model, QUARTER):
        expected = steps()
    with patched(case.model, QUARTER):
        asked.clear()
        close(steps(), expected)
    # Each prompt and its first step; then whoever did not make the last mask, or finds another one in the cache.
    assert len(asked) == (2 + 2) + 1 + 1 + 1 + 2 + 1


@torch.no_grad()
def test_rows_that_change_places_are_asked_again(asked: list[Tensor | None]) -> None:
    case = CASES["different numbers of images"]()
    with patched(case.model, QUARTER):
        answer = Answer(case)
        answer.step()
        answer.cache.reorder_cache(torch.tensor([0, 1]))
        asked.clear()
        answer.step()
        assert len(asked) == 1
        answer.step()
        assert len(asked) == 1


class NeverWaiting(TorchDispatchMode):
    """Fails where the device waits for numbers of the host; where the host waits for the device, that has none."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        after = {x.device.type for x in tree_leaves(made) if isinstance(x, Tensor)}
        assert len(given | after) < 2, f"{operator} from {given} to {after}"
        return made


def without_data(cache: DynamicCache) -> None:
    """Move what a cache holds to a device without data."""
    for layer in cache.layers:
        for name in ("_other", "_visual", "_means"):
            if (held := getattr(layer, name)) is not None:
                setattr(layer, name, tuple(x.to("meta") for x in held))
    first = next(layer for layer in cache.layers if isinstance(layer, CrossLayer))
    for (*shape, _), plan in list(first.state._plans.items()):  # which need data to be made
        plan.regions, plan.on_cpu, plan._scratch = plan.regions.to(torch.device("meta")), False, {}
        for key, value in vars(plan).items():
            setattr(plan, key, value.to("meta") if isinstance(value, Tensor) else value)
        first.state._plans[(*shape, torch.device("meta"))] = plan


@pytest.mark.parametrize("name", ["the last of two images", "different numbers of images"])
@torch.no_grad()
def test_a_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    case = replace(case, model=copy.deepcopy(case.model))
    with patched(case.model, FAR):
        answer = Answer(case)
        answer.step()
        case.model.to("meta")  # who needs numbers fails, as the host would wait for them
        without_data(answer.cache)
        answer.ids, mask = answer.ids.to("meta"), answer.kwargs["cross_attention_mask"]
        answer.kwargs["cross_attention_mask"] = mask.to("meta")
        with monkeypatch.context() as same:  # the mask is that of the prompt, which nobody can see here
            same.setattr(CrossState, "_show", lambda state, mask: False)
            answer.step()
            answer.step()
        with NeverWaiting():
            logits = answer.step()
            assert logits.shape[:2] == (len(mask), 1)
        with pytest.raises(NotImplementedError, match="no data"):  # a mask that comes from elsewhere
            answer.kwargs["cross_attention_mask"] = answer.kwargs["cross_attention_mask"].clone()
            answer.step()


@torch.no_grad()
def test_a_decoder_that_is_called_by_itself_has_no_name_for_its_mask(asked: list[Tensor | None]) -> None:
    case = CASES["all tiles"]()
    with patched(case.model, QUARTER):
        answer = Answer(case)
        for _ in range(2):
            answer.step()
        shown = asked[-1]
        assert shown is not None
        asked.clear()
        embedded = case.model.get_input_embeddings()(answer.ids[:, -1:])
        case.model.get_decoder()(
            inputs_embeds=embedded, past_key_values=answer.cache, cross_attention_mask=shown[:, :, -1:]
        )
        assert len(asked) == 1


@torch.no_grad()
def test_a_model_without_a_head_is_patched_too() -> None:
    case = built("mllama")
    base = case.model.base_model
    with plainly(case.model, QUARTER, prompts=True):
        expected = base(**case.inputs).last_hidden_state
    with patched(base, QUARTER, prefill="gaze"):
        close(base(**case.inputs).last_hidden_state, expected)


@torch.no_grad()
def test_a_compiled_decoder_knows_its_forward() -> None:
    case = tiny("mllama")
    with patched(case.model, FAR):
        expected = case.model(**case.inputs).logits
        case.model.get_decoder().compile(backend="eager")
        cache = DynamicCache()
        close(case.model(**case.inputs, past_key_values=cache).logits, expected)
        assert cache.get_seq_length() == expected.shape[1] and not gaze_state(cache).broken
