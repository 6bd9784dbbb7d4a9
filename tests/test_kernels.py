"""Whole steps by the kernels against the definition: natively on a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_kernels import DEVICE, KERNELS, needs_gpu, on_device
from sequences import BASE, LAYOUTS, MORE, SETTINGS, TURNS, Filled, separated, steps
from tiny import batch, tiny

from gazepatch import patched, stats
from gazepatch.config import GazeConfig
from gazepatch.kernels.plan import KernelPlan

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]


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


@pytest.mark.parametrize(
    ("layout", "settings", "more"),
    [
        ("35", "share", "soft cap"),
        ("35", "none, no periphery", "sinks of queries"),
        ("35", "everything", "soft cap and sinks"),
        ("rows of different images", "share", "sinks of queries"),
        ("rows of different images", "none, no periphery", "soft cap and sinks"),
        ("rows of different images", "everything", "soft cap"),
    ],
    ids=str,
)
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


@pytest.mark.parametrize("family", ["internvl_gpt_oss", "llava", "mllama", "paligemma_gemma2", "qwen2_vl"])
@torch.no_grad()
def test_a_patched_model(family: str) -> None:
    found = {}
    # Of a row that sees no image at all, an unpatched mllama makes something else on a GPU, too.
    twin = DEVICE if family == "mllama" else torch.device("cpu")
    for backend, device in (("torch", twin), ("triton", DEVICE)):
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
    torch.testing.assert_close(found["triton"][1], found["torch"][1], atol=1e-4, rtol=1e-4)
    assert found["torch"][2] == found["triton"][2] and found["torch"][2].read_share < 1
