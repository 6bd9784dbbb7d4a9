"""What only a GPU can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_kernels import DEVICE, KERNELS, needs_gpu, on_device
from sequences import BASE, LAYOUTS, Filled
from stepping import supported
from tiny import batch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from gazepatch import patched
from gazepatch.chunk import sort_chunk
from gazepatch.kernels.ops import decode
from gazepatch.kernels.plan import KernelPlan
from gazepatch.layout import Span
from gazepatch.ops.plan import plan_for

pytestmark = [pytest.mark.gpu, needs_gpu]

Make = Callable[..., Any]


@pytest.mark.usefixtures("poisoned")
@torch.no_grad()
def test_a_step_in_a_graph(sequences: Make) -> None:
    sequence = on_device(sequences([LAYOUTS["rows of different images"]], dim=64, steps=2)).to(torch.bfloat16)
    filled = Filled(sequence, KERNELS)
    filled.read(0, sequence.stops[0])
    filled.begin(sequence.stops[0], sequence.stops[0] + 1)
    entries, position = filled.layer.entries(), sequence.stops[0]
    query = sequence.query[:, :, position : position + 1].clone()
    plan = filled.state.plan(query, entries)
    bias = filled.state.bias(sequence.mask(position), DEVICE)
    total, score_mod = torch.zeros(1, dtype=torch.int64, device=DEVICE), sequence.score_mod(slice(1), 1)
    plan.decode(query, entries, score_mod, bias, total)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan.decode(query, entries, score_mod, bias, total).output
    for other in range(3):
        query.copy_(sequence.query[:, :, other : other + 1])
        graph.replay()
        torch.testing.assert_close(captured, plan.decode(query, entries, score_mod, bias, total).output)


def test_auto_is_kernels_on_a_gpu() -> None:
    chunk = sort_chunk([Span(0, 0, 36, (1, 6, 6), 0)], 1, 0, 40, BASE).to(DEVICE)
    assert isinstance(plan_for(chunk.regions, BASE, 1, 8, 2), KernelPlan)


def test_a_store_of_more_than_two_billion_numbers() -> None:
    slots, dim, splits = (1 << 24) + 64, 128, 3
    store = torch.zeros(1, 1, slots, dim, dtype=torch.bfloat16, device=DEVICE)
    store[:, :, -64:].normal_()
    query, key = (torch.randn(1, n, dim, dtype=torch.bfloat16, device=DEVICE) for n in (4, 5))
    runs = torch.tensor([[0, 9], [slots - 64, 64]], dtype=torch.int32, device=DEVICE).view(1, 1, 1, 2, 2)
    scratch = (torch.empty(1, splits, 4, size, device=DEVICE) for size in (dim, 2))
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    others, key = (None,) * 4, key[None]
    output = decode(query, key, key, None, store, store, runs, *others, *scratch, arrived, 0.1, None, 64, splits)
    seen = torch.cat([key, store[:, :, :9], store[:, :, -64:]], 2)
    expected = scaled_dot_product_attention(query[:, None], seen, seen, scale=0.1)
    torch.testing.assert_close(output[:, None], expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("family", ["llava", "llava_latent", "mllama", "qwen2_vl"])
@pytest.mark.usefixtures("fresh")
@torch.no_grad()
def test_generate_compiles_its_steps(family: str) -> None:
    case = batch(supported(family))
    model = case.model.to(DEVICE)
    inputs = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in case.inputs.items()}
    found = {}
    with patched(model, KERNELS):
        for cache in ("dynamic", "static"):
            settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
            found[cache] = [model.generate(**inputs, **settings) for _ in range(2)]
    model.cpu()
    assert all(torch.equal(answer, found["dynamic"][0]) for answers in found.values() for answer in answers)
    assert not counters["inductor"]["cudagraph_skips"]  # steps are recorded, not only compiled
