"""The kernels one by one, as operators of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_kernels import DEVICE, GPU, KERNELS, Selection, assert_runs, decode_arguments
from sequences import BASE

from gazepatch.chunk import sort_chunk
from gazepatch.kernels import settings
from gazepatch.kernels.ops import decode
from gazepatch.layout import Span
from gazepatch.ops.plan import means_of

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dim", [1, 16, 80])
@pytest.mark.parametrize("grids", [[(1, 5, 7)], [(1, 9, 7), (3, 4, 3)], [(1, 1, 1)]], ids=str)
def test_means(grids: list[tuple[int, int, int]], dim: int) -> None:
    spans = [Span(row, 0, h * w * t, (t, h, w), 0) for row, (t, h, w) in enumerate(grids)]
    chunk = sort_chunk(spans, len(spans), 0, max(span.stop for span in spans), BASE).to(DEVICE)
    entries = chunk.visual_entries(torch.randn(len(spans), 2, chunk.tokens, dim, device=DEVICE))
    means = means_of(chunk, entries, KERNELS)
    torch.testing.assert_close(means, chunk.means(entries), atol=1e-6, rtol=0)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("longest", [16, 20, 70], ids=["two regions a tile", "one", "three tiles a region"])
def test_splits_do_not_matter(longest: int, splits: int) -> None:
    query, key, _, _, store, *rest = arguments = decode_arguments(splits, longest)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None],
        *[torch.cat([key, store[:, :, :9], store[:, :, 64:80]], 2).repeat_interleave(2, 1)] * 2,
        scale=0.25,
    )
    torch.testing.assert_close(decode(*arguments), expected[:, :, 0], atol=1e-5, rtol=0)
    assert not rest[8].any()


def test_results_are_combined_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = decode_arguments(9)
    at_once = decode(*arguments)
    monkeypatch.setattr(settings, "HELD", 1)  # four results of 2 heads and 16 numbers, on 4 warps
    settings.forget()
    torch.testing.assert_close(decode(*arguments), at_once, atol=1e-6, rtol=0)
    settings.forget()


@pytest.mark.skipif(GPU, reason="a GPU has an order of its own")
@pytest.mark.parametrize("seed", range(4))
def test_whichever_program_comes_last(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    def other_order(x: int, y: int, z: int) -> None:
        across, down, _ = builder.grid_dim
        order = torch.randperm(across * down, generator=torch.Generator().manual_seed(seed))
        builder.grid_idx = (*divmod(order[x * down + y].item(), down), z)

    monkeypatch.setattr(builder, "set_grid_idx", other_order)
    arguments, case = decode_arguments(5), Selection(63, windows=1, group=4, distinct=7)
    case.mean_keys += torch.randn_like(case.mean_keys)
    output = decode(*arguments)
    runs, taken, _ = case.run([20, 9], "mean", splits=4)
    monkeypatch.undo()
    torch.testing.assert_close(output, decode(*arguments[:-1], 1), atol=1e-6, rtol=0)
    assert torch.equal(taken.bool(), case.expected([20, 9], "mean"))
    assert_runs(runs, taken.bool(), case)


def test_operators_are_sound() -> None:
    lengths = torch.tensor([[9, 7]], dtype=torch.int32, device=DEVICE)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    ops = torch.ops.gazepatch
    torch.library.opcheck(
        ops.window_means.default,
        (torch.randn(1, 2, 16, 8, device=DEVICE), lengths.cumsum(-1).int() - lengths, lengths, 9),
        test_utils=tests,
    )
    torch.library.opcheck(ops.decode.default, decode_arguments(2), test_utils=tests)
    case = Selection(36, windows=1, group=4, distinct=2)
    torch.library.opcheck(ops.select.default, case.arguments([9, 3], "mean", 2), test_utils=tests)


def test_operators_are_traced() -> None:
    arguments = decode_arguments(2)
    compiled = torch.compile(lambda *given: decode(*given) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), decode(*arguments) + 1)


@pytest.mark.parametrize(("kernel", "bare"), [("decode", False), ("select", True), ("prefill", True)])
def test_a_kernel_compiles_without_a_gpu(kernel: str, bare: bool) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"
    arguments = ["--kernel", kernel, "--target", "cuda90", "--dtype", "bf16", "--dim", "128", "--group", "4"]
    arguments += ["--bare"] if bare else []
    run = subprocess.run([sys.executable, script, *arguments, "--json", "--jobs", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout)["kernels"]
    assert row["spilled_bytes"] == 0 and 32 <= row["registers"] <= 255 and 0 < row["shared_bytes"] <= 227 * 1024
