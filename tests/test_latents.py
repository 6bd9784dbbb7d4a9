"""Decoders whose caches hold latents (MLA): gaze by its definition, what is expanded, and every such decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tiny import Case, batch, built, filled, tiny
from tiny.models import latent_text, redraw
from tiny.squares import llava
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gazepatch.caches.latents import LatentLayer
from gazepatch.config import GazeConfig
from gazepatch.conformance import AdapterConformance
from gazepatch.errors import UnsupportedModelError
from gazepatch.layout import Span
from gazepatch.patch import patch_of, patched, stats
from gazepatch.verification import generate_logits, verify

QUARTER = GazeConfig(region=(3, 3, 1), window=(3, 1, 1), budget=0.25, periphery=True, min_visual_tokens=0)
WHOLE = replace(QUARTER, budget=1.0)
NAMES = ("kimi_k25", "llava_latent", "mistral3_latent")
OTHERS = ("AXK1Config", "Glm4MoeLiteConfig", "MiniCPM3Config", "YoutuConfig")


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return built(request.param)


# ---- the definition, on keys and values that the model has expanded from its own cache


def blocks(span: Span, height: int, width: int) -> list[list[int]]:
    """Positions of every block of a span, from left to right and from top to bottom."""
    assert span.grid is not None
    _, h, w = span.grid
    stride = w + span.row_gap
    return [
        [
            span.start + y * stride + x
            for y in range(top, min(top + height, h))
            for x in range(left, min(left + width, w))
        ]
        for top in range(0, h, height)
        for left in range(0, w, width)
    ]


def regions_of(span: Span) -> list[list[list[int]]]:
    """For every region of three rows and columns its windows, which are its columns."""
    columns = blocks(span, 3, 1)
    return [[window for window in columns if set(window) <= set(region)] for region in blocks(span, 3, 3)]


def gaze(query: Tensor, key: Tensor, value: Tensor, regions: Sequence[Any], scale: float, seen: Tensor) -> Tensor:
    """Attention of one query, `[H, D]` over `[H, L, D]`: all heads read the same quarter of the regions."""

    def logit(window: list[int]) -> Tensor:
        return scale * (query * key[:, window].mean(1)).sum(-1) + torch.tensor(len(window)).log()

    scores = torch.stack([torch.stack([logit(w) for w in region]).logsumexp(0) for region in regions], 1).softmax(1)
    count = -(-len(regions) // 4)
    best = scores.mean(0).argsort(descending=True)[:count].tolist()
    far = [window for number, region in enumerate(regions) if number not in best for window in region]
    kept = seen.clone()
    kept[[position for window in far for position in window]] = False
    logits = torch.cat([scale * (key[:, kept] @ query[..., None])[..., 0], torch.stack([logit(w) for w in far], 1)], 1)
    values = torch.cat([value[:, kept], torch.stack([value[:, w].mean(1) for w in far], 1)], 1)
    return (logits.softmax(1)[..., None] * values).sum(1)


@contextmanager
def by_definition(case: Case) -> Iterator[None]:
    """The model's own cache and code, with the attention of its text decoder written out above in decode steps."""
    regions = [
        [region for span in case.spans if span.row == row for region in regions_of(span)]
        for row in range(len(case.inputs["input_ids"]))
    ]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        if query.shape[2] > 1:
            return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, query, key, value, mask, scaling=scaling
            )
        seen = torch.ones(len(query), key.shape[2], dtype=torch.bool) if mask is None else mask[:, 0, -1]
        rows = zip(query[:, :, 0], key, value, regions, seen.expand(len(query), -1), strict=True)
        return torch.stack([gaze(q, k, v, r, scaling, s) for q, k, v, r, s in rows])[:, None], None

    AttentionInterface.register("by_definition", attend)
    AttentionMaskInterface.register("by_definition", sdpa_mask)
    decoder = case.model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("by_definition")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("by_definition")
        AttentionMaskInterface._global_mapping.pop("by_definition")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_quarter_is_what_the_definition_says(case: Case, rows: int) -> None:
    case = case if rows == 1 else batch(case)
    dense, _ = generate_logits(case.model, case.inputs, 5)
    with by_definition(case):
        expected, tokens = generate_logits(case.model, case.inputs, 5)
    with patched(case.model, QUARTER):
        gazed, _ = generate_logits(case.model, case.inputs, 5, tokens)
        assert 0.2 < stats(case.model).read_share < 0.35
    assert (expected - dense).abs().max() > 0.01
    torch.testing.assert_close(gazed, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


# ---- every text decoder of the kind


@pytest.mark.parametrize("name", OTHERS)
def test_other_text_decoders(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")
    case = filled(llava(False, decoder=latent_text(getattr(transformers, name))))
    redraw(case.model.eval(), torch.Generator().manual_seed(1))
    case.model.generation_config.eos_token_id, case.model.generation_config.pad_token_id = None, 0
    contract = AdapterConformance()
    contract.test_decode_equals_the_reference(batch(case))
    contract.test_full_budget_generates_the_dense_tokens(case)
    contract.test_promises_of_verify(case)


# ---- what is kept, and what is expanded


def test_the_cache_holds_what_the_models_own_does(case: Case) -> None:
    own, ours = DynamicCache(), DynamicCache()
    with torch.no_grad():
        case.model(**case.inputs, past_key_values=own)
        with patched(case.model, WHOLE, dense_layers=(0,)):
            case.model(**case.inputs, past_key_values=ours)
            assert [isinstance(layer, LatentLayer) for layer in ours.layers] == [False, True]
            for layer, expected in zip(ours.layers, own.layers, strict=True):
                torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-5)
                torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-5)
                assert layer.keys.shape[1] == 1


@contextmanager
def expanding(case: Case) -> Iterator[list[int]]:
    """How many entries each call of an attention module's `expand_kv` gets."""
    seen: list[int] = []

    def noting(expand: Callable[..., Any]) -> Callable[..., Any]:
        def noted(latent: Tensor, rotated: Tensor) -> Any:
            seen.append(latent.shape[2])
            return expand(latent, rotated)

        return noted

    modules = [layer.self_attn for layer in case.model.get_decoder().layers]
    for module in modules:
        module.expand_kv = noting(module.expand_kv)
    try:
        yield seen
    finally:
        for module in modules:
            del module.expand_kv


def test_nothing_that_is_read_is_expanded(case: Case) -> None:
    prompt, width = case.inputs["input_ids"].shape[1], 24 + 8
    with expanding(case) as seen, patched(case.model, QUARTER):
        generate_logits(case.model, case.inputs, 3)
    # The prompt; then the new entry of each layer, and once its matrices.
    assert seen == [prompt] * 2 + [1, width, 1, width] + [1, 1] * 2
    with expanding(case) as seen:
        generate_logits(case.model, case.inputs, 2)
    assert seen == [prompt] * 2 + [prompt + 1] * 2 + [prompt + 2] * 2


@pytest.mark.parametrize(("head_reduce", "selections"), [("mean", 1), ("max", 1), ("none", 4)])
@pytest.mark.parametrize("least", [0, 10**6])
def test_entries_are_counted_once_for_all_heads_that_share_them(head_reduce: str, selections: int, least: int) -> None:
    case = built("kimi_k25")
    with patched(case.model, QUARTER, head_reduce=head_reduce, min_visual_tokens=least):
        generate_logits(case.model, case.inputs, 3)
        counted = stats(case.model)
    assert counted.visual_entries == 3 * 2 * selections * sum(span.tokens for span in case.spans)
    assert counted.read_share == 1 if least else 0.2 < counted.read_share < 0.35


# ---- settings and precisions


@pytest.mark.parametrize("head_reduce", ["mean", "max", "none"])
@pytest.mark.parametrize("periphery", [True, False], ids=["periphery", "bare"])
def test_queries_of_a_prompt_read_as_those_of_an_answer(case: Case, head_reduce: str, periphery: bool) -> None:
    config = replace(QUARTER, prefill="gaze", head_reduce=head_reduce, periphery=periphery)
    with patched(case.model, config):
        cached, tokens = generate_logits(case.model, case.inputs, 4)
        ids = torch.cat([case.inputs["input_ids"], tokens], 1)
        inputs = {**case.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            once = case.model(**inputs, use_cache=False).logits[:, -len(tokens[0]) - 1 :]
            kept = case.model(**inputs, use_cache=True).logits[:, -len(tokens[0]) - 1 :]
    for uncached in (once, kept):
        torch.testing.assert_close(uncached[:, : cached.shape[1]], cached, rtol=0, atol=1e-4)


def test_half_precision() -> None:
    case = tiny("llava_latent")
    case.model.to(torch.bfloat16)
    inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(torch.bfloat16)}
    with patched(case.model, QUARTER):
        report = verify(case.model, inputs)
    assert report.passed, report


def test_gradients_of_decode_steps() -> None:
    case = tiny("kimi_k25")
    weight = case.model.get_decoder().layers[0].self_attn.kv_b_proj.weight

    def gradient() -> Tensor:
        case.model.zero_grad()
        cache = DynamicCache()
        with torch.no_grad():
            case.model(**case.inputs, past_key_values=cache)
        case.model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits.square().mean().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    dense = gradient()
    with patched(case.model, WHOLE):
        torch.testing.assert_close(gradient(), dense, rtol=1e-3, atol=1e-5)


def test_adapters_of_peft_are_in_what_is_expanded() -> None:
    peft = pytest.importorskip("peft")
    case = tiny("kimi_k25")
    settings = peft.LoraConfig(target_modules=r".*language_model.*kv_b_proj", r=2, init_lora_weights=False)
    model = peft.get_peft_model(case.model, settings).eval()
    dense, tokens = generate_logits(model, case.inputs, 4)
    with model.disable_adapter():
        without, _ = generate_logits(model, case.inputs, 4, tokens)
    assert (without - dense).abs().max() > 0.01
    with patched(model, WHOLE):
        whole, _ = generate_logits(model, case.inputs, 4, tokens)
    torch.testing.assert_close(whole, dense, rtol=0, atol=1e-4)


# ---- kernels


def test_kernels_take_latents_as_wide_as_heads_may_be() -> None:
    case = built("kimi_k25")
    with patched(case.model, QUARTER, backend="torch"):
        expected, tokens = generate_logits(case.model, case.inputs, 1)
    with patched(case.model, QUARTER):
        patch_of(case.model).runtime.config = replace(QUARTER, backend="triton")
        gazed, _ = generate_logits(case.model, case.inputs, 1, tokens)
    torch.testing.assert_close(gazed, expected, rtol=0, atol=1e-4)


def test_kernels_refuse_wider_ones() -> None:
    case = filled(llava(False, decoder=latent_text(transformers.DeepseekV3Config, kv_lora_rank=256)))
    with patched(case.model.eval(), QUARTER):
        patch_of(case.model).runtime.config = replace(QUARTER, backend="triton")
        with pytest.raises(UnsupportedModelError, match=r"head dims up to 256, got float32, \(264, 264\)"):
            generate_logits(case.model, case.inputs, 1)
