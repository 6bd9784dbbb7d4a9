"""A step on a static cache changes nothing but numbers on the device: a CUDA graph can record it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from stepping import QUARTER, SETTINGS, assert_same, compiled, generate, static, supported
from tiny import Case, batch, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from gazepatch.caches.static import StaticGazeLayer, StaticState
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan
from gazepatch.patch import patched, stats
from gazepatch.score_mod import ScoreMod

OWNER = type("Owner", (), {})()  # stands for the patch that a cache belongs to


@pytest.fixture(params=["llava", "llava_latent"])
def case(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


def test_what_a_step_appends_takes_no_launch_of_its_own() -> None:
    pytest.importorskip("triton")
    case = tiny("llava")
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
        state._plans[2, 8, 2, device] = plan
    query, entries = torch.empty(2, 8, 50, 16, device=device), torch.empty(2, 2, 50, 16, device=device)
    layer.update(entries, entries)
    state.expect(0, query, 2, 16)
    state.finish(True)
    query, entries = query[:, :, :1], entries[:, :, :1]
    for mask in (torch.ones(2, 1, 1, 100, dtype=torch.bool, device=device), None):
        with OnDevice():
            state.step()
            read = layer.update(entries, entries)
            if state.decoding:
                decoded = state.plan(query, layer.entries()).decode(
                    query, layer.entries(), ScoreMod(0.25), state.bias(mask, device)
                )
                state.counters.add_read(0, decoded.read)
                assert decoded.output.shape == (2, 8, 1, 16)
            state.finish(True)
        held = layer.entries().key if state.regions is not None else read[0]
        assert held.shape[2] == 100  # no row has fewer visual tokens than the second, none


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


@pytest.mark.parametrize("name", ["llava", "llava_latent", "gemma3"])
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
            if name != "gemma3":  # transformers' own sliding windows count on the host
                with NeverWaiting():
                    case.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            else:
                case.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            now = held(cache)
            if step:  # the first one takes the scratch memory of the torch backend
                assert now == before
            before = now
        assert len(before) > 50 and any("_plans[(" in name for name in before)
        assert int(cache.get_seq_length()) == int(cache.gaze.filled) == mask.shape[1]


def addresses(cache: StaticCache) -> list[int]:
    """Of everything that steps write to."""
    of_state, of_counters = cache.gaze._buffers._held, cache.gaze.counters.buffers._held
    held = [*of_state.values(), *of_counters.values(), *cache.layers[0]._buffers._held.values(), cache.gaze.filled]
    return [memory.data_ptr() for memory in held]


@pytest.mark.parametrize("name", ["llava", "mllama"])
def test_statistics_of_steps_in_inference_mode(name: str) -> None:
    case = tiny(name)
    with patched(case.model, SETTINGS["quarter"]):
        wanted = (generate(case, 4, cache_implementation="static"), stats(case.model))[1]
        with torch.inference_mode():
            generate(case, 4, cache_implementation="static")
        assert stats(case.model) == wanted and wanted.steps == 3
        generate(case, 4, cache_implementation="static")
        assert stats(case.model) == wanted


def test_a_cache_that_is_reset_stays_where_it_is(case: Case, fresh: None) -> None:
    settings = {key: value for key, value in compiled().items() if key != "cache_implementation"}
    with patched(case.model, SETTINGS["periphery"]):
        cache = static(case)
        expected = generate(case, 3, past_key_values=cache, **settings)
        places = addresses(cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.gaze.regions is None
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(generate(case, 3, past_key_values=cache, **settings), expected)
        assert addresses(cache) == places
        cache.reset()
        text = torch.tensor([[1, 11, 12, 13]])
        answers = [
            case.model.generate(input_ids=text, max_new_tokens=4, past_key_values=past)
            for past in (cache, DynamicCache())
        ]
        assert torch.equal(*answers) and stats(case.model).visual_entries == 0


def test_the_kernels_write_where_they_wrote_before(case: Case) -> None:
    pytest.importorskip("triton")
    places = []
    with torch.no_grad(), patched(case.model, SETTINGS["periphery"], backend="triton"):
        cache = static(case)
        for _ in range(2):
            cache.reset()
            case.model(**case.inputs, past_key_values=cache)
            case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
            places.append(addresses(cache))
    assert places[0] == places[1] and len(places[0]) > 10
