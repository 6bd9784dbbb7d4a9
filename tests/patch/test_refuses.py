"""What `apply` and its kin refuse, and what they say to do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from patching import SMALL
from tiny import Case
from torch import nn

from gazepatch.errors import ConfigError, GazeError, PatchError, UnsupportedModelError
from gazepatch.patch import apply, is_patched, patched, restore, stats
from gazepatch.verification import fingerprint, generate_logits, verify


def test_applying_twice_is_refused_and_says_how_to_change_settings(case: Case) -> None:
    apply(case.model, SMALL)
    with pytest.raises(PatchError, match=r"patched already, with GazeConfig.*restore"):
        apply(case.model, SMALL)
    assert is_patched(case.model)


@pytest.mark.parametrize("function", [restore, stats])
def test_an_unpatched_model_is_refused(case: Case, function) -> None:
    with pytest.raises(PatchError, match=r"not patched: call gazepatch\.apply"):
        function(case.model)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, "llava"], ids=["module", "none", "name"])
def test_what_is_not_a_model_of_transformers_is_refused(thing) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a model of transformers, got"):
        apply(thing)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(UnsupportedModelError, match=r"'llama', only for .*llava.*To add one"):
        apply(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"budget": 0}, ConfigError),
        ({"budget": float("nan")}, ConfigError),
        ({"budget": 2.0}, ConfigError),
        ({"bugdet": 0.5}, ConfigError),
        ({"dense_layers": (7,)}, ConfigError),
        ({"dense_layers": (0, 1)}, UnsupportedModelError),
        ({"context_tokens": 4}, GazeError),
        ({"config": {"budget": 0.5}}, ConfigError),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_change_nothing(ran: Case, settings, error) -> None:
    before = fingerprint(ran.model)
    with pytest.raises(error):
        apply(ran.model, **settings)
    assert fingerprint(ran.model) == before


def test_flex_attention_is_refused(case: Case) -> None:
    case.model.config.text_config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        apply(case.model)


def test_an_attention_changed_while_patched_is_refused(ran: Case) -> None:
    dense = generate_logits(ran.model, ran.inputs, 2)[0]
    with patched(ran.model, SMALL):
        ran.model.set_attn_implementation({"vision_config": "eager"})  # which is nothing to us
        gazed = generate_logits(ran.model, ran.inputs, 2)[0]
        ran.model.set_attn_implementation("sdpa")
        for _ in range(2):
            with pytest.raises(PatchError, match=r"was changed to 'sdpa': call gazepatch\.restore\(model\), change it"):
                generate_logits(ran.model, ran.inputs, 2)
    assert torch.equal(generate_logits(ran.model, ran.inputs, 2)[0], dense) and not torch.equal(gazed, dense)


def test_a_part_that_is_patched_is_named(case: Case) -> None:
    apply(case.model.model, SMALL)
    for whole in (apply, verify):
        with pytest.raises(PatchError, match=r"a part of this model.* is patched already"):
            whole(case.model, *([case.inputs] if whole is verify else []))
    restore(case.model.model)
    apply(case.model, SMALL)


def test_a_model_with_the_configuration_of_a_patched_one_is_helped(ran: Case) -> None:
    dense = generate_logits(ran.model, ran.inputs, 2)[0]
    with patched(ran.model, SMALL):
        other = type(ran.model)(copy.deepcopy(ran.model.config)).eval()
        other.generation_config = ran.model.generation_config
        other.load_state_dict(ran.model.state_dict())
    with pytest.raises(PatchError, match=r"copy of a patched .* call model\.set_attn_implementation\('sdpa'\) instead"):
        apply(other, SMALL)
    other.set_attn_implementation("sdpa")
    assert torch.equal(generate_logits(other, ran.inputs, 2)[0], dense)
    apply(other, SMALL)


def test_a_patched_model_is_not_copied(ran: Case) -> None:
    with patched(ran.model, SMALL), pytest.raises(PatchError, match="cannot be copied"):
        copy.deepcopy(ran.model)
    with patched(ran.model, SMALL), pytest.raises(PatchError, match="or pickled"):
        pickle.dumps(ran.model)
    assert not is_patched(copy.deepcopy(ran.model))
