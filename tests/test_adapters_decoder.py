"""The text decoder by its adapter: where it is, and which of its layers can gaze."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from locating import IN_SEQUENCE, adapter_of, every_case
from tiny import Case, built, text
from tiny.models import since
from transformers import CONFIG_MAPPING

from gazepatch.adapters.base import OWN_ATTENTION
from gazepatch.registry import adapter_for


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return built(*request.param)


def shape_of(call: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    """Of the embeddings that a decoder is called with; Chameleon's makes them itself."""
    embeddings = call.get("inputs_embeds")
    return (*call["input_ids"].shape, config.hidden_size) if embeddings is None else tuple(embeddings.shape)


@every_case
def test_decoder(case: Case) -> None:
    adapter, model = adapter_of(case), case.model
    decoder = adapter.decoder(model)
    assert decoder.config is adapter.text_config(model.config) is model.config.get_text_config(decoder=True)
    assert adapter.decoder(model.base_model) is decoder
    assert len(decoder.layers) == decoder.config.num_hidden_layers
    seen: list[tuple[int, ...]] = []
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(shape_of(kwargs, decoder.config)), with_kwargs=True
    )
    with torch.no_grad():
        model(**case.inputs)
    hook.remove()
    assert seen == [(*case.inputs["input_ids"].shape, decoder.config.hidden_size)]


SLIDING, FULL = "sliding_attention layer", None
LATENTS = "keys and values are made of latents (MLA) in a way that nobody has looked at"

TEXT_DECODERS: dict[str, tuple[Callable[[], Any], list[str | None]]] = {
    "llama": (text, [FULL] * 2),
    "mistral with a window": (lambda: text(transformers.MistralConfig, sliding_window=8), [SLIDING] * 2),
    "mistral without": (lambda: text(transformers.MistralConfig, sliding_window=None), [FULL] * 2),
    "ministral3": (lambda: text(transformers.Ministral3Config), [FULL] * 2),
    "phi3 with a window": (lambda: text(transformers.Phi3Config, sliding_window=8), [SLIDING] * 2),
    "qwen2": (lambda: text(transformers.Qwen2Config, sliding_window=8), [FULL] * 2),
    "qwen2 with windows": (
        lambda: text(transformers.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        [FULL, SLIDING],
    ),
    "gemma2, soft caps": (lambda: text(transformers.Gemma2Config), [SLIDING, FULL]),
    "gpt_oss, sinks": (lambda: text(transformers.GptOssConfig), [SLIDING, FULL]),
    "mimo_v2_flash": (lambda: text(transformers.MiMoV2FlashConfig), [FULL, SLIDING]),
    "deepseek_v3": (lambda: text(transformers.DeepseekV3Config), [FULL] * 2),
    "dory, keys of the last run": (
        lambda: text(
            since("5.24", "DoryConfig"), n_input_layers=0, n_output_layers=0, recurrent_kv_cache_mode="last_loop"
        ),
        ["layers run several times a token, and read the keys of their last run out of the cache by themselves"] * 2,
    ),
    "sarvam_mla": (lambda: text(since("5.24", "SarvamMLAConfig")), [FULL] * 2),
    "mistral4": (lambda: text(transformers.Mistral4Config), [FULL] * 2),
    "longcat_flash": (lambda: text(transformers.LongcatFlashConfig), [LATENTS] * 2),
    "llama4": (
        lambda: text(transformers.Llama4TextConfig, num_hidden_layers=4),
        ["chunked_attention layer"] * 3 + [FULL],
    ),
}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_decoders_that_attend_by_themselves(name: str) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have {name} yet")
    config = transformers.LlavaConfig(text_config=CONFIG_MAPPING[name](num_hidden_layers=2))
    layers = range(config.text_config.num_hidden_layers)
    assert adapter_for("llava").dense_reasons(config) == dict.fromkeys(layers, OWN_ATTENTION[name])


@pytest.mark.parametrize("name", TEXT_DECODERS)
def test_any_text_decoder(name: str) -> None:
    make, expected = TEXT_DECODERS[name]
    config = transformers.LlavaConfig(text_config=make())
    adapter = adapter_for("llava")
    assert adapter.text_config(config).num_hidden_layers == len(expected)
    assert adapter.dense_reasons(config) == {i: reason for i, reason in enumerate(expected) if reason}
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    assert adapter.decoder(model) is adapter.decoder(model.base_model) is model.base_model.language_model
    assert adapter.decoder(model).config is config.get_text_config(decoder=True)


#: Layers that run twice a token.
LOOPED = {"inkling2_loop": [2, 3], "llava_looped": [1, 2]}


@pytest.mark.parametrize("name", sorted({name for name, _ in IN_SEQUENCE}))
def test_dense_reasons_of_families(name: str) -> None:
    case = built(name)
    kinds = getattr(case.model.config.get_text_config(decoder=True), "layer_types", None) or []
    expected = {i: f"{kind} layer" for i, kind in enumerate(kinds) if kind not in ("full_attention", "hybrid")}
    assert adapter_of(case).dense_reasons(case.model.config) == expected
    layers = range(case.model.config.get_text_config(decoder=True).num_hidden_layers)
    assert adapter_of(case).cache_layers(case.model.config) == [*layers, *LOOPED.get(name, [])]


def test_a_decoder_with_a_head_is_taken_without_it() -> None:
    with torch.device("meta"):
        headed = transformers.LlamaForCausalLM(text())
    assert adapter_for("llava").decoder(SimpleNamespace(get_decoder=lambda: headed)) is headed.model
