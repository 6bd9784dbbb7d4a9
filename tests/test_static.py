"""The static gaze cache: the dynamic one's answers, in memory that stays where it is, by steps that compile once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from tiny import Case, batch, tiny
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache

from gazepatch.caches.static import StaticGazeLayer, StaticState
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan
from gazepatch.patch import patch_of, patched, stats, trace
from gazepatch.scores import Scores

WHOLE = GazeConfig(region=(3, 3, 1), window=(1, 3, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = dataclasses.replace(WHOLE, budget=0.25)
SETTINGS = {
    "whole": WHOLE,
    "quarter": QUARTER,
    "periphery": dataclasses.replace(QUARTER, periphery=True, head_reduce="none"),
    "gaze prefill": dataclasses.replace(QUARTER, prefill="gaze"),
    "few visual tokens": dataclasses.replace(QUARTER, min_visual_tokens=10**6),
}
OWNER = type("Owner", (), {})()  # stands for the patch that a cache belongs to
NAMES = ("llava", "qwen2_vl", "gemma3")


@pytest.fixture
def case() -> Case:
    return tiny("llava")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Without anything that was compiled before."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(backend: str = "eager") -> dict[str, Any]:
    """What `generate` compiles its steps by, on CPU too."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def generate(case: Case, steps: int = 6, **settings: Any) -> Any:
    length = {"max_new_tokens": steps, "min_new_tokens": steps}
    kept = {"return_dict_in_generate": True, "output_logits": True}
    return case.model.generate(**{**case.inputs, **length, **kept, **settings})


def static(case: Case, length: int = 300) -> StaticCache:
    return StaticCache(config=case.model.config, max_cache_len=length)


def supported(name: str) -> Case:
    """A tiny model, if this transformers can give it a static cache without a patch."""
    case = tiny(name)
    try:
        generate(case, 2, cache_implementation="static")
    except IndexError:  # gemma3 in 5.16: the masks of its images are shorter than the cache
        pytest.skip(f"transformers {transformers.__version__} itself cannot make {name} a static cache")
    return case


def longer(case: Case, tokens: int) -> dict[str, Tensor]:
    """The prompt with so many more tokens of text behind it."""
    inputs = dict(case.inputs)
    for name, more in (("input_ids", torch.arange(11, 11 + tokens)), ("attention_mask", torch.ones(tokens).long())):
        inputs[name] = torch.cat([inputs[name], more.expand(len(inputs[name]), -1)], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, tokens))
    return inputs


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "two rows"])
@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_answers_as_a_dynamic_one(name: str, rows: int) -> None:
    case = supported(name) if rows == 1 else batch(supported(name))
    dense = generate(case, cache_implementation="static")
    for of_settings, config in SETTINGS.items():
        with patched(case.model, config):
            expected, counted = generate(case), stats(case.model)
            actual = generate(case, cache_implementation="static")
            assert_same(actual, expected)
            assert stats(case.model) == counted and counted.steps == 5, of_settings
            if config.budget == 1.0:
                assert_same(actual, dense)
    assert_same(generate(case, cache_implementation="static"), dense)


@pytest.mark.parametrize("name", NAMES)
def test_steps_compile_once(name: str, fresh: None) -> None:
    case = supported(name)
    cache = {"max_cache_len": 300}  # else a longer prompt is another shape for transformers as well
    with patched(case.model, SETTINGS["periphery"]):
        generate(case, **compiled(), **cache)  # gemma3: some steps before its windows are full, some behind
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (2 if name == "gemma3" else 1) and not counters["graph_break"]
        for inputs in (case.inputs, longer(case, 3)):
            expected, counted = generate(case, **inputs), stats(case.model)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert_same(generate(case, **inputs, **compiled(), **cache), expected)
            assert stats(case.model) == counted
        assert counters["stats"]["unique_graphs"] == graphs


def test_rows_with_different_images_compile(case: Case, fresh: None) -> None:
    pair = batch(case)
    with patched(case.model, QUARTER):
        assert_same(generate(pair, **compiled("aot_eager")), generate(pair))
        assert stats(case.model).read_share < 1.0 and counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_follows_its_patch(case: Case, fresh: None) -> None:
    dense = generate(case, **compiled())
    with patched(case.model, QUARTER):
        expected, counted = generate(case), stats(case.model)
        assert_same(generate(case, **compiled()), expected)
        assert stats(case.model) == counted
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(generate(case, **compiled()), dense)


def test_the_kernels_compile_within_a_step(case: Case, fresh: None) -> None:
    pytest.importorskip("triton")
    with patched(case.model, SETTINGS["periphery"]):
        expected, counted = generate(case, 3), stats(case.model)
    with patched(case.model, SETTINGS["periphery"], backend="triton"):
        assert_same(generate(case, 3, **compiled("aot_eager")), expected)
        assert stats(case.model) == counted and counters["stats"]["unique_graphs"] == 1


def test_what_the_kernels_write_is_not_copied(case: Case, fresh: None) -> None:
    # Operators that write to their arguments are made pure by a compiler, which then has to see that it need not.
    pytest.importorskip("triton")
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except BackendCompilerFailed as error:  # no C++ compiler, or a space in the path of torch
        pytest.skip(f"nothing can be compiled here: {str(error).splitlines()[0]}")
    with patched(case.model, SETTINGS["periphery"], backend="triton"):
        expected = generate(case, 3)
        found, codes = run_and_get_code(generate, case, 3, **compiled("inductor"))
    assert_same(found, expected)
    (code,) = (code for code in codes if "gazepatch.decode" in code)
    assert code.count("gazepatch.select.default(") == code.count("gazepatch.decode.default(") == 2  # layers
    assert "clone" not in code and "copy_.default" not in code


def test_what_a_step_appends_takes_no_launch_of_its_own(case: Case) -> None:
    pytest.importorskip("triton")
    with torch.no_grad(), patched(case.model, QUARTER, backend="triton"):
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        with Ran() as ran:
            case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert ran.count["gazepatch::select"] == ran.count["gazepatch::decode"] == 2  # layers
    assert not {"aten::index_copy_", "aten::copy_"} & set(ran.count)


class Ran(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[operator.name().partition(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


class NeverWaiting(TorchDispatchMode):
    """Fails where the host asks for a number of the device, which no CUDA graph can."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::equal")
        return operator(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Fails where a tensor is made anywhere else: a CUDA graph cannot copy from the host's memory."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            assert tensor is None or tensor.device.type == "meta", f"{operator} on the host"
        return made


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_a_step_stays_on_its_device(name: str) -> None:
    # A device without data: whoever needs some fails, and what is made on the host shows.
    config, device = SETTINGS[name], torch.device("meta")
    state = StaticState(OWNER, config, 100)
    layer = StaticGazeLayer(state, gazes=True, leads=True)
    state.begin([Span(0, 3, 43, (1, 5, 8), 0)], 2, 50)  # the rows differ
    if state.regions is not None:  # a plan needs data, so it is made here and moved
        plan = DecodePlan(state.regions, config, 2, 8, 2)
        for key, value in vars(plan).items():
            setattr(plan, key, value.to(device) if isinstance(value, Tensor) else value)
        plan.regions, plan.on_cpu = state.regions.to(device), False
        state._devices["plan 2 8 2", device] = plan
    query, entries = torch.empty(2, 8, 50, 16, device=device), torch.empty(2, 2, 50, 16, device=device)
    layer.update(entries, entries)
    state.expect(0, query, entries, entries)
    state.finish(True)
    query, entries = query[:, :, :1], entries[:, :, :1]
    for mask in (torch.ones(2, 1, 1, 100, dtype=torch.bool, device=device), None):
        with OnDevice():
            state.step()
            read = layer.update(entries, entries)
            if state.decoding:
                decoded = state.plan(query, layer.entries()).decode(
                    query, layer.entries(), Scores(0.25), state.bias(mask, device)
                )
                state.counters.add_read(0, decoded.read)
                assert decoded.output.shape == (2, 8, 1, 16)
            state.finish(True)
        assert read[0].shape[2] == 100  # no row has fewer visual tokens than the second, none


def held(cache: StaticCache) -> dict[str, Any]:
    """Address and shape of every tensor that a step may read, and every number that a compiler might rely on."""
    found: dict[str, Any] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = (value.data_ptr(), tuple(value.shape), value.stride())
        elif isinstance(value, (int, float, str, type(None))):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                look(f"{name}[{key}]", part)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                look(f"{name}[{i}]", part)
        elif type(value).__module__.startswith("gazepatch"):
            for key in vars(value):
                if key != "state":
                    look(f"{name}.{key}", getattr(value, key))

    look("state", cache.gaze)
    look("layers", [layer for layer in cache.layers if isinstance(layer, StaticGazeLayer)])
    return found


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_nothing_moves_from_step_to_step(name: str) -> None:
    case = batch(supported(name))
    mask = case.inputs["attention_mask"]
    with torch.no_grad(), patched(case.model, SETTINGS["periphery"]):
        cache, before = static(case), None
        case.model(**case.inputs, past_key_values=cache)
        for step in range(4):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            ids = torch.full((2, 1), 20 + step)
            positions = mask.sum(1, keepdim=True) - 1
            if name == "llava":  # transformers' own sliding windows count on the host
                with NeverWaiting():
                    case.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            else:
                case.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            now = held(cache)
            if step:  # the first one takes the scratch memory of the torch backend
                assert now == before
            before = now
        assert len(before) > 50 and any("_devices[('plan" in name for name in before)
        assert int(cache.get_seq_length()) == int(cache.gaze.filled) == mask.shape[1]


def test_a_cache_that_is_reset_stays_where_it_is(case: Case, fresh: None) -> None:
    settings = {key: value for key, value in compiled().items() if key != "cache_implementation"}
    with patched(case.model, QUARTER):
        cache = static(case)
        expected = generate(case, past_key_values=cache, **settings)
        places = {name: memory.data_ptr() for name, memory in cache.layers[0]._memory.items()}
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.gaze.regions is None
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(generate(case, past_key_values=cache, **settings), expected)
        assert {name: memory.data_ptr() for name, memory in cache.layers[0]._memory.items()} == places
        cache.reset()
        text = torch.tensor([[1, 11, 12, 13]])
        answers = [
            case.model.generate(input_ids=text, max_new_tokens=4, past_key_values=past)
            for past in (cache, DynamicCache())
        ]
        assert torch.equal(*answers) and stats(case.model).visual_entries == 0


def image_turn(case: Case) -> dict[str, Tensor]:
    """Another image, with text around it."""
    first = case.spans[0]
    image, text = case.inputs["input_ids"][:, first.start : first.stop], torch.tensor([[21, 22, 23]])
    pixels = torch.randn_like(case.inputs["pixel_values"][:1])
    return {"input_ids": torch.cat([text, image, text], 1), "pixel_values": pixels}


def two_turns(case: Case, cache: Any, second: dict[str, Tensor]) -> Any:
    first = generate(case, past_key_values=cache).sequences
    ids = torch.cat([first, second["input_ids"]], 1)
    inputs = second | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generate(dataclasses.replace(case, inputs=inputs), past_key_values=cache)


@pytest.mark.parametrize("late", [False, True], ids=["", "sorted then"])
@pytest.mark.parametrize("turn", ["text", "image"])
def test_a_second_turn(case: Case, turn: str, late: bool) -> None:
    second = image_turn(case) if turn == "image" else {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    enough = sum(span.tokens for span in case.spans) + 1 if late else 0
    dense = two_turns(case, static(case), second)
    for config in (WHOLE, QUARTER):
        with patched(case.model, config, min_visual_tokens=enough):
            expected, counted = two_turns(case, DynamicCache(), second), stats(case.model)
            actual = two_turns(case, static(case), second)
            assert_same(actual, expected)
            assert stats(case.model) == counted
            if config is WHOLE:
                assert_same(actual, dense)


def test_beams(case: Case) -> None:
    pair = batch(case)
    with patched(case.model, QUARTER):
        expected, counted = generate(pair, num_beams=3), stats(case.model)
        assert torch.equal(generate(pair, num_beams=3, cache_implementation="static").sequences, expected.sequences)
        assert stats(case.model) == counted


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_context_tokens(name: str, fresh: None) -> None:
    case = batch(tiny(name))
    tokens = torch.randn(3, case.model.config.get_text_config().hidden_size)
    with patched(case.model, SETTINGS["gaze prefill"], context_tokens=tokens):
        expected, counted = generate(case), stats(case.model)
        assert_same(generate(case, cache_implementation="static"), expected)
        assert_same(generate(case, **compiled()), expected)
        assert stats(case.model) == counted and counted.context_entries
        assert counters["stats"]["unique_graphs"] == 1


def test_context_tokens_in_a_second_turn(case: Case) -> None:
    with patched(case.model, QUARTER, context_tokens=torch.randn(3, 64)):
        for second in (image_turn(case), {"input_ids": torch.tensor([[11, 12, 13, 14]])}):
            assert_same(two_turns(case, static(case), second), two_turns(case, DynamicCache(), second))


def test_a_trace_of_static_steps(case: Case, fresh: None) -> None:
    with patched(case.model, QUARTER):
        with trace(case.model) as expected:
            generate(case)
        for settings in ({"cache_implementation": "static"}, compiled()):
            with trace(case.model) as actual:
                generate(case, **settings)
            assert actual.steps == expected.steps and len(actual.steps) == 5


def test_what_a_static_cache_refuses(case: Case) -> None:
    with patched(case.model, QUARTER), torch.no_grad():
        with pytest.raises(CacheError, match="room for 40 tokens, got"):
            case.model(**case.inputs, past_key_values=static(case, 40))
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(CacheError, match="keeps its 1 rows, got 2"):
            cache.batch_repeat_interleave(2)
    one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    with torch.no_grad():
        with pytest.raises(CacheError, match="start with a new cache after"):
            case.model(**one)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="patched again"):
            case.model(**one)
        filled = static(case)
        case.model(**case.inputs, past_key_values=filled)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="patch the model first"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=filled)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_of_other_rows_is_refused(case: Case, kind: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    with torch.no_grad(), patched(case.model, QUARTER, backend=backend):
        cache = static(case) if kind == "static" else DynamicCache()
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match=r"holds keys \(1, .*a step brought \(2, .*: keep its rows"):
            case.model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)


def test_steps_behind_the_end_of_the_room(case: Case) -> None:
    pytest.importorskip("triton")
    with torch.no_grad(), patched(case.model, QUARTER, backend="triton"):
        cache = static(case, case.inputs["input_ids"].shape[1] + 1)
        case.model(**case.inputs, past_key_values=cache)
        one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        case.model(**one)
        held = [store.clone() for store in cache.layers[1]._other]
        case.model(**one)  # the device alone knows how many there are
        assert all(torch.equal(*pair) for pair in zip(cache.layers[1]._other, held, strict=True))
        with pytest.raises(CacheError, match=r"steps brought it to .*larger max_cache_len"):
            case.model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


def test_sliding_windows_have_no_room_for_context_tokens() -> None:
    case = supported("gemma3")
    tokens = torch.randn(3, case.model.config.get_text_config().hidden_size)
    with patched(case.model, QUARTER, context_tokens=tokens), pytest.raises(CacheError, match="sliding windows"):
        generate(case, cache_implementation="static")


def test_a_step_that_failed_leaves_a_broken_cache(case: Case) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), patched(case.model, QUARTER):
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        hook = case.model.model.language_model.layers[1].register_forward_pre_hook(fail)
        one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        with pytest.raises(ZeroDivisionError):
            case.model(**one)
        hook.remove()
        with pytest.raises(CacheError, match="failed half-way"):
            case.model(**one)
        assert patch_of(case.model).runtime.running.forward is None
