"""Context tokens in whole models: against a naive lengthened call, and cached decoding against uncached forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive import lengthened, lengthened_row, temperature_by_position
from tiny import CORE, FAMILIES, SHORT, VIDEO, Case, Media, batch, built, filled, tiny, type_of
from torch import Tensor
from transformers import DynamicCache

from gazepatch.config import GazeConfig
from gazepatch.patch import patched
from gazepatch.registry import adapter_for
from gazepatch.verification import _uncached, generate_logits

WHOLE = GazeConfig(min_visual_tokens=10**6)
GAZE = GazeConfig(region=(3, 3, 2), window=(3, 1, 1), budget=0.3, prefill="gaze", min_visual_tokens=0)
BARE = replace(GAZE, periphery=False)
SETTINGS = {"whole": WHOLE, "gaze": GAZE, "gaze, no periphery": BARE}
COUNTS = (1, 4, 16)

NAMES = [*CORE, *SHORT]
#: Every other family whose context tokens are exact.
OTHERS = [name for name in FAMILIES if name not in CORE and not adapter_for(type_of(name)).no_context]
KINDS = [(name, kind) for name in NAMES for kind in ("image", "video", "batch") if kind != "video" or name in VIDEO]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return made(*request.param)


def made(name: str, kind: str = "image") -> Case:
    case = tiny(name, video=kind == "video")
    return batch(case) if kind == "batch" else case


def context(case: Case, count: int) -> Tensor:
    """Context tokens unlike each other, large enough to be noticed."""
    return torch.randn(count, decoder_of(case).config.hidden_size, generator=torch.Generator().manual_seed(count))


def decoder_of(case: Case) -> Any:
    return adapter_for(case.model.config.model_type).decoder(case.model)


def decoder_call(case: Case, **arguments: Any) -> tuple[dict[str, Any], Any]:
    """What the model calls its text decoder with, and what that returns."""
    seen: dict[str, Any] = {}
    decoder = decoder_of(case)
    hooks = [
        decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True),
        decoder.register_forward_hook(lambda module, args, output: seen.update(output=output)),
    ]
    with torch.no_grad():
        case.model(**case.inputs, use_cache=False, **arguments)
    for hook in hooks:
        hook.remove()
    output = seen.pop("output")
    return seen, output


def assert_close(actual: Tensor, expected: Tensor, kept: Tensor | None = None, limit: float = 2e-5) -> None:
    """Within the limit at a scale of 5."""
    actual, expected = (actual, expected) if kept is None else (actual[kept], expected[kept])
    assert actual.shape == expected.shape and expected.isfinite().all()
    error, scale = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item() / 5)
    assert error <= limit * scale, f"differs by {error:.2e} at scale {scale:.1f}"


# ---- every family


def assert_naive(case: Case, count: int, limit: float = 2e-5) -> None:
    call, _ = decoder_call(case)
    tokens = context(case, count)
    longer = lengthened(call, case.spans, tokens, decoder_of(case).config)
    with torch.no_grad(), temperature_by_position(decoder_of(case), longer.places):
        expected = longer.outer(decoder_of(case)(**longer.call).last_hidden_state)
    with patched(case.model, WHOLE, context_tokens=tokens):
        _, output = decoder_call(case)
    assert_close(output.last_hidden_state, expected, case.inputs["attention_mask"].bool(), limit)


def test_a_forward_is_the_naive_one(case: Case) -> None:
    for count in COUNTS:
        assert_naive(case, count)


@pytest.mark.parametrize("name", OTHERS)
def test_a_forward_of_any_other_family_is_the_naive_one(name: str) -> None:
    # Gemma 4 does not scale its scores, so that rounding shows more.
    assert_naive(batch(built(name)), 4, limit=5e-5 if name.startswith("gemma4") else 2e-5)


@pytest.mark.parametrize(
    ("settings", "count"), [("whole", 4), ("gaze", 1), ("gaze", 16), ("gaze, no periphery", 4)], ids=str
)
@torch.no_grad()
def test_cached_equals_uncached(case: Case, settings: str, count: int) -> None:
    with patched(case.model, SETTINGS[settings], context_tokens=context(case, count)):
        cached, tokens = generate_logits(case.model, case.inputs, 3)
        # Unpatched models differ by 1e-5 themselves.
        assert_close(cached, _uncached(case.model, case.inputs, tokens), limit=4e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", [*SHORT, "llama4"])
@torch.no_grad()
def test_images_leave_a_sliding_window_or_a_chunk(name: str, settings: GazeConfig) -> None:
    case = made(name, "batch")
    with patched(case.model, settings, context_tokens=context(case, 4)):
        cached, tokens = generate_logits(case.model, case.inputs, 30)
        assert_close(cached, _uncached(case.model, case.inputs, tokens), limit=4e-5)


@torch.no_grad()
def test_eager_attention(case: Case) -> None:
    case.model.set_attn_implementation("eager")
    try:
        with patched(case.model, GAZE, context_tokens=context(case, 4)):
            eager = case.model(**case.inputs, use_cache=False).logits
    finally:
        case.model.set_attn_implementation("sdpa")
    with patched(case.model, GAZE, context_tokens=context(case, 4)):
        sdpa = case.model(**case.inputs, use_cache=False).logits
    assert_close(eager, sdpa, case.inputs["attention_mask"].bool())


# ---- what must make a difference, and what must not


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_other_context_tokens_give_other_logits(name: str) -> None:
    case, logits = tiny(name), []
    for tokens in (context(case, 4), context(case, 4) + 0.01, context(case, 4)[:3], context(case, 4).flip(0)):
        with patched(case.model, WHOLE, context_tokens=tokens):
            logits.append(case.model(**case.inputs, use_cache=False).logits)
    first = case.spans[0].stop
    for other in logits[1:]:
        # The first token after an image notices, and nothing before it.
        assert (other[:, first] - logits[0][:, first]).abs().max() > 1e-4
        assert_close(other[:, :first], logits[0][:, :first])


def two_images(name: str) -> Case:
    case = tiny(name)
    return filled(replace(case, rows=[(case.many or case.rows[0])[:2]]))


def other_picture(case: Case, number: int) -> Case:
    """The same prompt with other pixels in one of its two images."""
    media = list(case.rows[0])
    inputs = {k: v + torch.randn(v.shape) if "pixel" in k else v for k, v in media[number].inputs.items()}
    media[number] = replace(media[number], inputs=inputs)
    return filled(replace(case, rows=[media]))


def at_context(case: Case, module: Any, image: int) -> list[Tensor]:
    """What modules of the decoder say at the slots of an image's context tokens, one after the other."""
    row = lengthened_row(case.spans, 0, case.inputs["input_ids"].shape[1], 4)
    slots, found = [i for i, place in enumerate(row) if place.context is not None and place.image == image], []
    assert len(slots) == 4

    def note(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        assert hidden.shape[1] == len(row)
        found.append(hidden[:, slots])

    hooks = [part.register_forward_hook(note) for part in module]
    with patched(case.model, GAZE, context_tokens=context(case, 4)), torch.no_grad():
        case.model(**case.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_context_tokens_see_their_own_image_only(name: str) -> None:
    case = two_images(name)
    layers = decoder_of(case).layers
    before, own, other = (at_context(c, layers, 0) for c in (case, other_picture(case, 0), other_picture(case, 1)))
    assert len(before) == len(layers)
    for layer in range(len(layers)):
        assert_close(other[layer], before[layer])
        assert (own[layer] - before[layer]).abs().max() > 1e-3
    # After the first layer the second image itself has seen the first one.
    attention = [layers[0].self_attn]
    before, other, own = (
        at_context(c, attention, 1)[0] for c in (case, other_picture(case, 0), other_picture(case, 1))
    )
    assert_close(other, before)
    assert (own - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3_short"])
def test_nothing_is_left_of_context_tokens(name: str) -> None:
    case = tiny(name)
    with patched(case.model, GAZE):
        before, tokens = generate_logits(case.model, case.inputs, 2)
    with patched(case.model, GAZE, context_tokens=context(case, 4)):
        between, _ = generate_logits(case.model, case.inputs, 2, tokens)
    with patched(case.model, GAZE, context_tokens=None):
        after, _ = generate_logits(case.model, case.inputs, 2, tokens)
    assert torch.equal(before, after) and not torch.equal(before, between)


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_is_as_if_unpatched(name: str) -> None:
    case = tiny(name)
    text = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dense, tokens = generate_logits(case.model, text, 3)
    with patched(case.model, GAZE, context_tokens=context(case, 4)):
        assert torch.equal(generate_logits(case.model, text, 3, tokens)[0], dense)


# ---- several turns on one cache

Turns = Sequence[Sequence[Sequence[Media]]]  # by turn and row


def conversation(case: Case, turns: Turns) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The inputs of every turn, and those of all turns at once. Rows are padded in every turn."""
    parts = [filled(replace(case, rows=rows)).inputs for rows in turns]
    rows = [[item for turn in turns for item in turn[row]] for row in range(len(turns[0]))]
    ids, mask = (torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "attention_mask"))
    whole = filled(replace(case, rows=rows)).inputs | {"input_ids": ids, "attention_mask": mask}
    return parts, whole | case.extra(ids, rows)


def turn_by_turn(case: Case, parts: Sequence[Mapping[str, Tensor]], mask: Tensor, positions: Tensor | None) -> Tensor:
    """Logits of all positions, from one forward a turn on one cache; the last token of each turn goes by itself."""
    cache, logits, start = DynamicCache(config=case.model.config.get_text_config(decoder=True)), [], 0
    for part in parts:
        rows, length = part["input_ids"].shape
        for first, stop in ((0, length - 1), (length - 1, length)):
            arguments = {
                name: value[:, first:stop] if value.shape == (rows, length) else value
                for name, value in part.items()
                if first == 0 or value.shape == (rows, length)
            }
            begin, end = start + first, start + stop
            arguments["attention_mask"] = mask[:, :end]
            if positions is not None:
                arguments["position_ids"] = positions[..., begin:end]
            logits.append(case.model(**arguments, past_key_values=cache, use_cache=True).logits)
            assert cache.get_seq_length() == end
        start += length
    return torch.cat(logits, 1)


TURNS = {
    "another image": lambda a, b: [[[a]], [[b]]],
    "text": lambda a, b: [[[a]], [[]]],
    "text, then an image": lambda a, b: [[[]], [[a]], [[b]]],
    "rows": lambda a, b: [[[a], [a, b]], [[a, b], [b]], [[], []]],
    "images in one row, then in the other": lambda a, b: [[[a], []], [[], [b]]],
}


#: Gemma 3 makes its images see themselves in the first forward of a cache only, so that is where they have to be.
TALKS = [
    (name, turns)
    for name in (
        "llava",
        "llava_pixtral",
        "internvl",
        "internvl_short",
        "kimi_k25",
        "qwen2_vl",
        "qwen3_vl",
        "gemma3_short",
    )
    for turns in (["text"] if name == "gemma3_short" else TURNS)
]


@pytest.mark.parametrize(("name", "turns"), TALKS)
@torch.no_grad()
def test_turns(name: str, turns: str) -> None:
    case = tiny(name)
    parts, whole = conversation(case, TURNS[turns](*case.rows[0]))
    mask, positions = whole["attention_mask"], decoder_call(replace(case, inputs=whole))[0].get("position_ids")
    kept = mask.bool()
    dense = case.model(**whole, use_cache=False).logits
    try:
        assert_close(turn_by_turn(case, parts, mask, positions), dense, kept)
    except RuntimeError as error:
        pytest.skip(f"this version of transformers cannot do it unpatched: {error}")
    for settings, count in ((WHOLE, 4), (GAZE, 1), (GAZE, 16), (BARE, 4)):
        with patched(case.model, settings, context_tokens=context(case, count)):
            uncached = case.model(**whole, use_cache=False).logits
            assert_close(turn_by_turn(case, parts, mask, positions), uncached, kept)
