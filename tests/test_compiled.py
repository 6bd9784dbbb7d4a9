"""torch.compile on patched models: steps on a static cache compile once, those on a dynamic one stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import QUARTER, SETTINGS, assert_same, compiled, generate, longer, supported
from tiny import Case, batch, tiny
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from transformers import DynamicCache

from gazepatch.patch import patched, stats

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def case() -> Case:
    return tiny("llava")


once_for_all_caches = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch 2.9 compiles a step anew for every static cache, without a patch too"
)


@once_for_all_caches
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "llava_latent"])
def test_steps_compile_once(name: str) -> None:
    case = supported(name)
    cache = {"max_cache_len": 300}  # else a longer prompt is another shape for transformers as well
    with patched(case.model, SETTINGS["periphery"]):
        generate(case, **compiled(), **cache)  # gemma3: some steps before its windows are full, some after
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (2 if name == "gemma3" else 1) and not counters["graph_break"]
        for inputs in (case.inputs, longer(case, 3)):
            expected, counted = generate(case, **inputs), stats(case.model)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert_same(generate(case, **inputs, **compiled(), **cache), expected)
            assert stats(case.model) == counted
        assert counters["stats"]["unique_graphs"] == graphs


def test_rows_with_different_images_compile(case: Case) -> None:
    pair = batch(case)
    with patched(case.model, QUARTER):
        assert_same(generate(pair, **compiled("aot_eager")), generate(pair))
        assert stats(case.model).read_share < 1.0 and counters["stats"]["unique_graphs"] == 1


@once_for_all_caches
def test_a_compiled_model_follows_its_patch(case: Case) -> None:
    dense = generate(case, **compiled())
    with patched(case.model, QUARTER):
        expected, counted = generate(case), stats(case.model)
        assert_same(generate(case, **compiled()), expected)
        assert stats(case.model) == counted
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(generate(case, **compiled()), dense)


def test_the_kernels_compile_within_a_step(case: Case) -> None:
    pytest.importorskip("triton")
    with patched(case.model, SETTINGS["periphery"]):
        expected, counted = generate(case, 3), stats(case.model)
    with patched(case.model, SETTINGS["periphery"], backend="triton"):
        assert_same(generate(case, 3, **compiled("aot_eager")), expected)
        assert stats(case.model) == counted and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("settings", ["whole", "periphery"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["llava", "llava_latent", "mllama"])
def test_a_step_writes_to_nothing_that_moves(name: str, backend: str, settings: str) -> None:
    # A step that does is not recorded as a CUDA graph, only compiled.
    if backend == "triton":
        pytest.importorskip("triton")
    case, moving = supported(name), list[set[int]]()

    def look(graph: GraphModule, inputs: Any) -> Any:
        seen = TracingContext.get().fw_metadata
        written = {i for i, info in enumerate(seen.input_info) if info.mutates_data}
        assert written
        moving.append(written - {*seen.static_input_indices})
        return graph.forward

    with patched(case.model, SETTINGS[settings], backend=backend):
        generate(case, 2, **compiled(aot_autograd(fw_compiler=look, inference_compiler=look)))
    assert moving == [set()]


def test_what_the_kernels_write_is_not_copied(case: Case) -> None:
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


@torch.no_grad()
def test_a_step_on_a_dynamic_cache(case: Case) -> None:
    compiled = torch.compile(case.model.forward, backend="eager", dynamic=True)
    with patched(case.model, QUARTER):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            case.model(**case.inputs, past_key_values=cache)
        of_cache = zip((case.model, compiled), caches, strict=True)
        steps = [run(input_ids=torch.tensor([[5]]), past_key_values=cache).logits for run, cache in of_cache]
        torch.testing.assert_close(*steps)
        assert stats(case.model).steps == 1 and not caches[1].gaze.broken
