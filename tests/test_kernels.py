"""The kernels against their PyTorch twins: natively where there is a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import BASE, LAYOUTS, MORE, SETTINGS, TURNS, Filled, separated, steps
from tiny import Case, batch, tiny
from torch import Tensor

from gazepatch import apply, inspect, patched, stats
from gazepatch.backend import choose
from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError, UnsupportedModelError
from gazepatch.layout import Span
from gazepatch.ops.plan import means_of, plan_for
from gazepatch.regions import ABSENT, sort_chunk
from gazepatch.scores import Scores
from gazepatch.selection import region_scores, window_logits
from gazepatch.selection import select as torch_select

pytest.importorskip("triton")
from gazepatch.kernels.ops import decode, select, window_means
from gazepatch.kernels.plan import KernelPlan

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = replace(BASE, backend="triton")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def on_device(sequence: Any) -> Any:
    return replace(
        sequence,
        **{name: getattr(sequence, name).to(DEVICE) for name in ("query", "key", "value", "visible")},
        **{name: x.to(DEVICE) for name in ("sinks", "bias") if (x := getattr(sequence, name)) is not None},
    )


# ---- whole steps against the definition


@torch.no_grad()
def assert_every_step_is_the_reference(sequence: Any, config: GazeConfig) -> None:
    filled = Filled(on_device(sequence), config)
    for position, decoded in steps(filled):
        output, kept = sequence.reference(position, config)
        assert decoded.output.shape == (*output.shape[:2], 1, output.shape[2])
        torch.testing.assert_close(decoded.output[:, :, 0].cpu(), output, atol=2e-5, rtol=0)
        if filled.state.regions is not None:
            assert int(decoded.read) == sequence.read(kept, config)


STEPS = [
    ("one token", "share"),
    ("35", "share"),
    ("36 without text", "share, no periphery"),
    ("63 and much text", "none"),
    ("100", "paper"),
    ("100", "everything"),
    ("divisible", "number"),
    ("divisible", "none, no periphery"),
    ("several, adjacent", "windows of one token"),
    ("video", "flat windows through time"),
    ("row gaps", "max"),
    ("no grid", "share"),
    ("rows of different images", "share"),
    ("rows of different images", "few tokens in some rows"),
    ("rows of different images", "number, no periphery"),
    ("rows of different images", "everything"),
    ("a row without an image", "share"),
    ("a row without an image", "none"),
    ("padding before rows alike", "max"),
]


@pytest.mark.parametrize(("layout", "settings"), STEPS, ids=str)
def test_steps(layout: str, settings: str, sequences: Make) -> None:
    assert_every_step_is_the_reference(sequences([LAYOUTS[layout]]), replace(KERNELS, **SETTINGS[settings]))


@pytest.mark.parametrize("settings", ["share", "none"])
@pytest.mark.parametrize(("key_heads", "group"), [(1, 1), (2, 7), (1, 17)], ids=str)
def test_heads(key_heads: int, group: int, settings: str, sequences: Make) -> None:
    sequence = sequences([LAYOUTS["several, text between"]], key_heads=key_heads, group=group)
    assert_every_step_is_the_reference(sequence, replace(KERNELS, **SETTINGS[settings]))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (63, 63), (80, 96), (128, 64), (256, 256)], ids=str)
def test_dimensions(dim: int, value_dim: int, sequences: Make) -> None:
    sequence = sequences([LAYOUTS["several, text between"]], key_heads=1, dim=dim, value_dim=value_dim)
    assert_every_step_is_the_reference(replace(sequence, scale=dim**-0.5), KERNELS)


@pytest.mark.parametrize("more", ["soft cap", "sinks of queries", "soft cap and sinks"])
@pytest.mark.parametrize("layout", ["35", "rows of different images"])
@pytest.mark.parametrize("settings", ["share", "none, no periphery", "everything"])
def test_more_than_dot_products(layout: str, settings: str, more: str, sequences: Make) -> None:
    sequence = MORE[more](sequences([LAYOUTS[layout]], steps=2))
    assert_every_step_is_the_reference(sequence, replace(KERNELS, **SETTINGS[settings]))


@pytest.mark.parametrize("turns", ["rows alike, then not", "images in one row, then in the other"])
def test_turns(turns: str, sequences: Make) -> None:
    assert_every_step_is_the_reference(sequences(TURNS[turns], steps=2), KERNELS)


@pytest.mark.parametrize(
    ("turns", "settings"),
    [
        ([LAYOUTS["rows alike"]], "none"),
        ([LAYOUTS["a row without an image"]], "share, no periphery"),
        ([LAYOUTS["rows of different images"]], "few tokens in some rows"),
        (TURNS["images in one row, then in the other"], "share"),
    ],
    ids=["rows alike", "a row without an image", "rows of different images", "images in one row, then in the other"],
)
@torch.no_grad()
def test_numbers_of_what_was_read(turns: Any, settings: str, sequences: Make) -> None:
    sequence, config = sequences(turns), replace(BASE, **SETTINGS[settings])
    numbers = []
    for made, of in ((replace(config, backend="triton"), on_device(sequence)), (config, sequence)):
        filled = Filled(of, made)
        *_, (position, decoded) = steps(filled)
        plan = filled.state.plan(of.query[:, :, :1], filled.layer.entries())
        numbers.append(plan.numbers(decoded.selected).cpu().sort(-1).values)
        assert isinstance(plan, KernelPlan) == (made.backend == "triton")
        assert len(numbers[-1].unique()) > 1 and position == sequence.stops[-1]
    assert torch.equal(*numbers)


@pytest.mark.parametrize(
    "dtype",
    # The interpreter multiplies bfloat16 as if it were integers.
    [torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])],
    ids=str,
)
@pytest.mark.parametrize("settings", ["share", "none"])
@torch.no_grad()
def test_low_precision(settings: str, dtype: torch.dtype, sequences: Make) -> None:
    config = replace(BASE, **SETTINGS[settings])
    sequence = separated(sequences([LAYOUTS["rows of different images"]], dim=64), config).to(dtype)
    position = sequence.stops[0]
    filled = Filled(on_device(sequence), replace(config, backend="triton"))
    filled.read(0, position)
    decoded = filled.decode(position, filled.sequence.mask(position))
    output, kept = sequence.reference(position, config)
    assert decoded.output.dtype == dtype and int(decoded.read) == sequence.read(kept, config)
    twin = sequence.twin(position, config, kept)
    error, usual = ((x.cpu().float() - output).abs().max().item() for x in (decoded.output[:, :, 0], twin))
    rounding = torch.finfo(dtype).eps / 2 * output.abs().max().item()
    assert error <= 2 * usual + rounding, f"error {error:.2e}, plain attention in {dtype} has {usual:.2e}"


# ---- selection: the same decisions as the twin


class Selection:
    """Random windows for `select`, and its outputs."""

    def __init__(self, regions: int, windows: int, group: int, distinct: int, rows: int = 2) -> None:
        key_heads, dim, total = 2, 16, regions * windows
        # Small integers have exact products, and few of them many ties.
        self.query = torch.randint(-1, 2, (rows, key_heads * group, dim), device=DEVICE).float()
        self.mean_keys = torch.randint(0, distinct, (rows, key_heads, total, dim), device=DEVICE).float()
        counts = torch.randint(1, 3, (rows, regions, windows), device=DEVICE)
        self.length = counts.sum(-1).int()
        self.length[-1, regions // 2 :] = 0  # regions that only the first row has
        present = (self.length > 0)[..., None].expand_as(counts)
        self.log_counts = counts.float().log().masked_fill(~present, ABSENT).flatten(1)
        self.start = (self.length.cumsum(-1) - self.length).int()
        self.group, self.windows, self.regions = group, windows, regions
        self.shape = (rows, key_heads)

    def arguments(self, budget: list[int], head_reduce: str, splits: int) -> tuple[Any, ...]:
        """Of `select`."""
        selections = self.group if head_reduce == "none" else 1
        rows, key_heads = self.shape
        heads, whole = key_heads * self.group, {"dtype": torch.int32, "device": DEVICE}
        return (
            *(self.query, self.mean_keys, self.log_counts, self.start, self.length, torch.tensor(budget, **whole)),
            torch.empty(rows, heads, self.regions * self.windows, device=DEVICE),
            torch.empty(rows, heads, self.regions, device=DEVICE),
            torch.empty(rows, key_heads, selections, max(budget), 2, **whole),
            torch.empty(rows, key_heads, selections, self.regions, dtype=torch.int8, device=DEVICE),
            torch.tensor([5], device=DEVICE),
            torch.zeros(rows * key_heads, **whole),
            *(0.25, None, head_reduce == "max", True, splits),
        )

    def run(self, budget: list[int], head_reduce: str, splits: int) -> tuple[Tensor, Tensor, int]:
        """Runs, taken regions and tokens that were counted."""
        arguments = self.arguments(budget, head_reduce, splits)
        select(*arguments)
        logits, _, runs, taken, total, arrived = arguments[6:12]
        assert not arrived.any()
        torch.testing.assert_close(logits, self.logits().flatten(1, 2), atol=1e-5, rtol=0)
        return runs, taken, int(total) - 5

    def logits(self) -> Tensor:
        grouped = self.query.unflatten(1, (-1, self.group))
        return window_logits(grouped, self.mean_keys, self.log_counts, Scores(0.25))

    def expected(self, budget: list[int], head_reduce: str) -> Tensor:
        """Which regions the twin takes."""
        scores = region_scores(self.logits().softmax(-1), self.windows, head_reduce)
        scores = scores.masked_fill((self.length == 0)[:, None, None], -1.0)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        for row, count in enumerate(budget):
            taken[row].scatter_(-1, torch_select(scores[row], count), True)
        return taken


@pytest.mark.parametrize("head_reduce", ["mean", "max", "none"])
@pytest.mark.parametrize("regions", [1, 35, 36, 63, 100])
def test_selection_among_ties(regions: int, head_reduce: str) -> None:
    # One window a region and heads that agree: equal scores are equal to the bit here as in the twin.
    case = Selection(regions, windows=1, group=4 if regions > 36 else 1, distinct=2)
    if head_reduce != "none":
        case.query = case.query[:, :: case.group].repeat_interleave(case.group, 1)
    for share in (0.0, 0.3, 1.0):
        budget = [round(share * regions), round(share * (regions // 2))]
        if max(budget):
            runs, taken, total = case.run(budget, head_reduce, splits=3)
            expected = case.expected(budget, head_reduce)
            assert torch.equal(taken.bool(), expected)
            assert_runs(runs, expected, case)
            assert total == int((expected * case.length[:, None, None]).sum())


def assert_runs(runs: Tensor, taken: Tensor, case: Selection) -> None:
    for row, head, group in torch.cartesian_prod(*map(torch.arange, taken.shape[:3])).view(-1, 3).tolist():
        numbers = taken[row, head, group].nonzero()[:, 0]
        held = torch.stack([case.start[row, numbers], case.length[row, numbers]], -1)
        unused = held.new_zeros(runs.shape[3] - len(numbers), 2)
        assert torch.equal(runs[row, head, group], torch.cat([held, unused]))


@pytest.mark.parametrize(("regions", "windows"), [(36, 4), (63, 9), (5, 50)], ids=str)
@pytest.mark.parametrize("group", [1, 7])
def test_selection_by_windows(regions: int, windows: int, group: int) -> None:
    case = Selection(regions, windows, group, distinct=7)
    case.mean_keys += torch.randn_like(case.mean_keys)  # no two scores alike
    case.mean_keys = case.mean_keys.mT.contiguous().mT  # as on CPU
    budget = [regions // 3, 1]
    _, taken, _ = case.run(budget, "mean", splits=2)
    assert torch.equal(taken.bool(), case.expected(budget, "mean"))


def test_a_row_without_budget_selects_nothing() -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    runs, taken, _ = case.run([9, 0], "mean", splits=1)
    assert taken[0].sum() == 9 * 2 and not taken[1].any() and not runs[1].any()


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_scores_that_are_no_numbers_stay_in_bounds(nan: float) -> None:
    case = Selection(36, windows=1, group=4, distinct=3)
    case.query[0] = nan
    arguments = case.arguments([9, 4], "mean", 2)
    select(*arguments)
    runs, taken = arguments[8:10]
    assert torch.equal(taken[0].nonzero()[:, -1].view(2, 9), torch.arange(9, device=DEVICE).expand(2, 9))
    assert_runs(runs, taken.bool(), case)


@pytest.mark.parametrize("group", [1, 4])
def test_many_regions(group: int) -> None:
    case = Selection(5000, windows=1, group=group, distinct=2, rows=1)
    case.query = case.query[:, ::group].repeat_interleave(group, 1)
    case.length[:] = 1
    _, taken, _ = case.run([500], "mean", splits=1)
    assert torch.equal(taken.bool(), case.expected([500], "mean"))


# ---- means


@pytest.mark.parametrize("dim", [1, 16, 80])
@pytest.mark.parametrize("grids", [[(1, 5, 7)], [(1, 9, 7), (3, 4, 3)], [(1, 1, 1)]], ids=str)
def test_means(grids: list[tuple[int, int, int]], dim: int) -> None:
    spans = [Span(row, 0, h * w * t, (t, h, w), 0) for row, (t, h, w) in enumerate(grids)]
    chunk = sort_chunk(spans, len(spans), 0, max(span.stop for span in spans), BASE).to(DEVICE)
    entries = chunk.visual_entries(torch.randn(len(spans), 2, chunk.tokens, dim, device=DEVICE))
    means = means_of(chunk, entries, KERNELS)
    torch.testing.assert_close(means, chunk.means(entries), atol=1e-6, rtol=0)


# ---- operators


def decode_arguments(splits: int, longest: int = 16) -> tuple[Any, ...]:
    query, key = torch.randn(1, 4, 16, device=DEVICE), torch.randn(1, 2, 5, 16, device=DEVICE)
    store = torch.randn(1, 2, 80, 16, device=DEVICE)
    runs = (
        torch.tensor([[0, 9], [20, 0], [64, 16]], dtype=torch.int32, device=DEVICE).expand(1, 2, 1, 3, 2).contiguous()
    )
    scratch = torch.empty(2, splits, 2, 16, device=DEVICE), torch.empty(2, splits, 2, 2, device=DEVICE)
    arrived = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    return (
        query,
        key,
        key,
        None,
        store,
        store,
        runs,
        None,
        None,
        None,
        None,
        *scratch,
        arrived,
        0.25,
        None,
        longest,
        splits,
    )


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
    torch.library.opcheck(
        window_means,
        (torch.randn(1, 2, 16, 8, device=DEVICE), lengths.cumsum(-1).int() - lengths, lengths, 9),
        test_utils=tests,
    )
    torch.library.opcheck(decode, decode_arguments(2), test_utils=tests)
    case = Selection(36, windows=1, group=4, distinct=2)
    torch.library.opcheck(select, case.arguments([9, 3], "mean", 2), test_utils=tests)


def test_operators_are_traced() -> None:
    arguments = decode_arguments(2)
    compiled = torch.compile(lambda *given: decode(*given) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), decode(*arguments) + 1)


# ---- a whole model


@pytest.mark.parametrize("family", ["internvl_gpt_oss", "llava", "mllama", "paligemma_gemma2", "qwen2_vl"])
@torch.no_grad()
def test_a_patched_model(family: str) -> None:
    found = {}
    for backend, device in (("torch", torch.device("cpu")), ("triton", DEVICE)):
        torch.manual_seed(0)
        case = batch(tiny(family))
        model = case.model.to(device)
        inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in case.inputs.items()}
        with patched(model, KERNELS, backend=backend):
            ran = model.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found[backend] = ran.sequences.cpu(), torch.stack(ran.logits).cpu(), stats(model)
        model.cpu()
    assert torch.equal(found["torch"][0], found["triton"][0])
    torch.testing.assert_close(found["triton"][1], found["torch"][1], atol=2e-5, rtol=1e-4)
    assert found["torch"][2] == found["triton"][2] and found["torch"][2].read_share < 1


# ---- the choice


@pytest.fixture(scope="module")
def case() -> Case:
    return tiny("llava")


def test_auto_is_torch_on_cpu(case: Case) -> None:
    assert choose("auto", torch.device("cpu")).name == "torch"
    assert choose("auto", torch.device("cuda")) == ("triton", "kernels, as the model is on CUDA")
    assert inspect(case.model).backend == "torch: plain PyTorch, as the model is on cpu"


def test_forcing_kernels_on_cpu_is_an_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs a model on a GPU, got one on cpu"):
        choose("triton", torch.device("cpu"))
    if not GPU:
        with pytest.raises(ConfigError, match="set TRITON_INTERPRET=1"):
            apply(case.model, backend="triton")
    choose("triton", torch.device("cuda"))


@torch.no_grad()
def test_what_the_kernels_do_not_take(sequences: Make) -> None:
    sequence = sequences([LAYOUTS["divisible"]], dim=16)
    sequence = replace(
        sequence, query=sequence.query.double(), key=sequence.key.double(), value=sequence.value.double()
    )
    filled = Filled(on_device(sequence), KERNELS)
    filled.read(0, sequence.stops[0])
    with pytest.raises(
        UnsupportedModelError,
        match=r"needs one type among .*, got float64",
    ):
        filled.decode(sequence.stops[0])


def test_gradients_are_left_to_the_twin(sequences: Make) -> None:
    filled = Filled(on_device(sequences([LAYOUTS["divisible"]])), KERNELS)
    filled.read(0, filled.sequence.stops[0])
    filled.begin(filled.sequence.stops[0], filled.sequence.stops[0] + 1)
    entries = filled.layer.entries()
    query = filled.sequence.query[:, :, :1].clone().requires_grad_()
    plan, scores = filled.state.plan(query, entries), Scores(0.25)
    assert isinstance(plan, KernelPlan) and plan.unfit(query, entries, scores) == "has no gradients of decode steps"
    plan.config = replace(KERNELS, backend="auto")
    plan.decode(query, entries, scores).output.sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


@torch.no_grad()
def test_biases_are_left_to_the_twin(sequences: Make) -> None:
    sequence = on_device(MORE["biases"](sequences([LAYOUTS["several, text between"]])))
    position = sequence.stops[0]
    filled = Filled(sequence, KERNELS)
    filled.read(0, position)
    filled.begin(position, position + 1)
    query, entries = sequence.query[:, :, position : position + 1], filled.layer.entries()
    scores = filled.state.laid(sequence.scores(slice(position, position + 1), position + 1))
    plan = filled.state.plan(query, entries)
    with pytest.raises(UnsupportedModelError, match="backend='triton' takes no biases"):
        plan.decode(query, entries, scores)
    plan.config = replace(KERNELS, backend="auto")
    expected, _ = sequence.reference(position, KERNELS)
    torch.testing.assert_close(plan.decode(query, entries, scores).output[:, :, 0], expected, atol=2e-5, rtol=0)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, gazepatch.ops.plan, gazepatch.backend; print('gazepatch.kernels.ops' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_a_kernel_compiles_without_a_gpu() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "compile_kernels.py"
    arguments = ["--kernel", "decode", "--target", "cuda90", "--dtype", "bf16", "--dim", "128", "--json", "--jobs", "1"]
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout)["kernels"]
    assert row["spilled_bytes"] == 0 and 32 <= row["registers"] <= 255 and 0 < row["shared_bytes"] <= 227 * 1024


# ---- only on a GPU


@pytest.mark.gpu
@needs_gpu
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
    total, scores = torch.zeros(1, dtype=torch.int64, device=DEVICE), sequence.scores(slice(1), 1)
    plan.decode(query, entries, scores, bias, total)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan.decode(query, entries, scores, bias, total).output
    for other in range(3):
        query.copy_(sequence.query[:, :, other : other + 1])
        graph.replay()
        torch.testing.assert_close(captured, plan.decode(query, entries, scores, bias, total).output)


@pytest.mark.gpu
@needs_gpu
def test_auto_is_kernels_on_a_gpu() -> None:
    chunk = sort_chunk([Span(0, 0, 36, (1, 6, 6), 0)], 1, 0, 40, BASE).to(DEVICE)
    assert isinstance(plan_for(chunk.regions, BASE, 1, 8, 2), KernelPlan)
