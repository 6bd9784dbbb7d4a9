"""apply and restore: what changes, and what must not."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import transformers
from patching import SMALL
from tiny import Case, tiny

from gazepatch.counters import Stats
from gazepatch.patch import apply, is_patched, patched, restore, stats
from gazepatch.verification import fingerprint, generate_logits


def test_apply_returns_the_model_and_restore_undoes_it(ran: Case) -> None:
    before, dense = fingerprint(ran.model), generate_logits(ran.model, ran.inputs, 4)[0]
    assert apply(ran.model, SMALL) is ran.model
    assert is_patched(ran.model)
    assert not torch.equal(generate_logits(ran.model, ran.inputs, 4)[0], dense)
    assert restore(ran.model) is ran.model
    assert not is_patched(ran.model)
    assert fingerprint(ran.model) == before
    assert torch.equal(generate_logits(ran.model, ran.inputs, 4)[0], dense)


def test_settings_can_be_given_by_name(case: Case) -> None:
    apply(case.model, SMALL, budget=3)
    generate_logits(case.model, case.inputs, 1)
    assert stats(case.model).read_entries < stats(case.model).visual_entries


def test_the_vision_tower_keeps_its_attention(case: Case) -> None:
    before = case.model.config.vision_config._attn_implementation
    apply(case.model, SMALL)
    assert case.model.config.vision_config._attn_implementation == before
    assert case.model.config._attn_implementation == before


def test_nothing_of_the_patch_is_saved(case: Case, tmp_path) -> None:
    apply(case.model, SMALL)
    case.model.save_pretrained(tmp_path)
    assert "gaze" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == case.model.state_dict().keys()
    assert not is_patched(loaded)


def test_state_dict_and_parameters_do_not_change(case: Case) -> None:
    names, parameters = list(case.model.state_dict()), [id(p) for p in case.model.parameters()]
    apply(case.model, SMALL)
    assert list(case.model.state_dict()) == names
    assert [id(p) for p in case.model.parameters()] == parameters


def test_two_models_of_one_class_and_one_configuration_do_not_see_each_other(ran: Case) -> None:
    other = type(ran.model)(ran.model.config).eval()
    other.load_state_dict(ran.model.state_dict())
    dense = generate_logits(other, ran.inputs, 4)[0]
    before = fingerprint(other)["config"]
    with patched(ran.model, SMALL):
        assert not is_patched(other)
        assert torch.equal(generate_logits(other, ran.inputs, 4)[0], dense)
        assert not torch.equal(generate_logits(ran.model, ran.inputs, 4)[0], dense)
    assert fingerprint(other)["config"] == before


def test_two_patched_models_keep_their_own_settings() -> None:
    cases = [tiny("llava"), tiny("qwen2_vl")]
    for case, budget in zip(cases, (0.5, 1.0), strict=True):
        apply(case.model, SMALL, budget=budget)
    for case in cases:
        generate_logits(case.model, case.inputs, 2)
    assert stats(cases[0].model).read_share < 0.7
    assert stats(cases[1].model).read_share == 1.0


def test_restoring_one_of_two_leaves_the_other_patched() -> None:
    first, second = tiny("llava"), tiny("llava")
    apply(first.model, SMALL)
    apply(second.model, SMALL)
    gazing = generate_logits(second.model, second.inputs, 3)[0]
    restore(first.model)
    assert torch.equal(generate_logits(second.model, second.inputs, 3)[0], gazing)


def test_eager_attention_is_kept_where_nothing_gazes(case: Case) -> None:
    case.model.set_attn_implementation("eager")
    generate_logits(case.model, case.inputs, 1)
    with torch.no_grad():
        dense = case.model(**case.inputs, output_attentions=True)
        with patched(case.model, SMALL):
            prompt = case.model(**case.inputs, output_attentions=True)
            whole = generate_logits(case.model, case.inputs, 4)[0]
    assert torch.equal(prompt.logits, dense.logits)
    assert len(prompt.attentions) == len(dense.attentions)
    assert torch.isfinite(whole).all()


def test_an_attention_chosen_while_patched_stays_chosen(case: Case) -> None:
    apply(case.model, SMALL)
    case.model.set_attn_implementation("eager")
    restore(case.model)
    assert case.model.config.text_config._attn_implementation == "eager"


def test_a_features_function_that_was_set_on_the_instance_comes_back(ran: Case) -> None:
    own = ran.model.model.get_image_features
    ran.model.model.get_image_features = replaced = lambda *a, **k: own(*a, **k)
    with patched(ran.model, SMALL):
        assert ran.model.model.get_image_features is not replaced
    assert ran.model.model.get_image_features is replaced


def test_a_model_thrown_away_leaves_no_functions_behind(case: Case) -> None:
    names = set(transformers.AttentionInterface._global_mapping)
    apply(case.model, SMALL)
    assert set(transformers.AttentionInterface._global_mapping) != names
    del case
    model = tiny("llava").model
    apply(model, SMALL)
    del model
    gc.collect()
    # The fixture's model is alive still, this test's own is not.
    assert len(set(transformers.AttentionInterface._global_mapping) - names) == 1


def test_dense_layers_stay_dense(ran: Case) -> None:
    with patched(ran.model, SMALL, dense_layers=(1,)):
        generate_logits(ran.model, ran.inputs, 2)
        assert list(stats(ran.model).layers) == [0]


@pytest.mark.parametrize("prefill", ["dense", "gaze"])
@pytest.mark.parametrize("name", ["llava", "llava_latent"])
def test_autocast_casts_as_it_does_unpatched(name: str, prefill: str) -> None:
    # Keys are in single precision there, as rotation is, and values are not.
    case, settings = tiny(name), {"max_new_tokens": 4, "min_new_tokens": 4}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = case.model.generate(**case.inputs, **settings)
        with patched(case.model, SMALL, budget=1.0, prefill=prefill):
            found = case.model.generate(**case.inputs, **settings)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(dense.logits), rtol=0.1, atol=0.1)


def test_statistics_start_again_with_every_prompt(ran: Case) -> None:
    with patched(ran.model, SMALL):
        generate_logits(ran.model, ran.inputs, 5)
        first = stats(ran.model)
        generate_logits(ran.model, ran.inputs, 5)
        assert stats(ran.model) == first
        assert first.steps == 5


def test_two_threads_do_not_see_each_other(ran: Case) -> None:
    other = tiny("llava", seed=3).inputs
    with patched(ran.model, SMALL):
        wanted = [(generate_logits(ran.model, *case)[0], stats(ran.model)) for case in ((ran.inputs, 6), (other, 9))]
        found: list[tuple[torch.Tensor, Stats] | None] = [None, None]
        both_done = threading.Barrier(2)

        def run(place: int, inputs: dict, tokens: int) -> None:
            for _ in range(3):
                logits = generate_logits(ran.model, inputs, tokens)[0]
            both_done.wait(timeout=60)
            found[place] = logits, stats(ran.model)

        threads = [threading.Thread(target=run, args=case) for case in ((0, ran.inputs, 6), (1, other, 9))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for alone, together in zip(wanted, found, strict=True):
        assert together is not None and torch.equal(alone[0], together[0])
        assert alone[1] == together[1]


def test_a_thread_that_never_ran_the_model_sees_what_was_read_last(ran: Case) -> None:
    with patched(ran.model, SMALL):
        generate_logits(ran.model, ran.inputs, 3)
        found: list[Stats] = []
        watcher = threading.Thread(target=lambda: found.append(stats(ran.model)))
        watcher.start()
        watcher.join()
        assert found == [stats(ran.model)] and found[0].steps == 3


def test_training_through_a_patched_model(ran: Case) -> None:
    def gradients(**settings: object) -> list[torch.Tensor]:
        ran.model.zero_grad()
        with patched(ran.model, SMALL, **settings):
            ran.model(**ran.inputs, labels=ran.inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in ran.model.parameters() if p.grad is not None]

    ran.model.zero_grad()
    ran.model(**ran.inputs, labels=ran.inputs["input_ids"]).loss.backward()
    dense = [p.grad.clone() for p in ran.model.parameters() if p.grad is not None]
    whole = gradients(prefill="gaze", budget=1.0)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(dense, whole, strict=True))
    gazing = gradients(prefill="gaze", budget=1)
    assert any(not torch.allclose(a, b, atol=1e-5) for a, b in zip(dense, gazing, strict=True))


@pytest.mark.parametrize("wrappers", ["compile", "parallel", "compile, parallel", "parallel, compile"])
def test_a_wrapped_model_is_the_model(ran: Case, wrappers: str) -> None:
    wrapped: torch.nn.Module = ran.model
    for wrapper in wrappers.split(", "):
        wrapped = torch.nn.DataParallel(wrapped) if wrapper == "parallel" else torch.compile(wrapped, backend="eager")
    apply(wrapped, SMALL)
    assert is_patched(ran.model)
    restore(wrapped)
    assert not is_patched(ran.model)


def test_a_block_may_be_left_unpatched(ran: Case) -> None:
    with pytest.raises(KeyError), patched(ran.model, SMALL):
        restore(ran.model)
        raise KeyError
    assert not is_patched(ran.model)
