"""Where the kernels are used, and what is left to their PyTorch twins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_kernels import GPU, KERNELS, on_device
from sequences import LAYOUTS, MORE, Filled
from tiny import Case, tiny

from gazepatch import apply, inspect
from gazepatch.backend import choose
from gazepatch.errors import ConfigError, GazeError, UnsupportedModelError
from gazepatch.kernels.plan import KernelPlan
from gazepatch.score_mod import ScoreMod

pytestmark = pytest.mark.usefixtures("poisoned")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def case() -> Case:
    return tiny("llava")


def test_auto_is_torch_on_cpu(case: Case) -> None:
    assert choose("auto", torch.device("cpu")).name == "torch"
    assert choose("auto", torch.device("cuda")) == ("triton", "kernels, as the model is on CUDA")
    assert inspect(case.model).backend == "torch: plain PyTorch, as the model is on cpu"
    with pytest.raises(GazeError, match="move the model instead"):
        inspect(case.model, device="cuda")


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


@torch.no_grad()
def test_many_heads_of_a_key_head_are_left_to_the_twin(sequences: Make) -> None:
    filled = Filled(on_device(sequences([LAYOUTS["divisible"]], key_heads=1, group=33)), KERNELS)
    position = filled.sequence.stops[0]
    filled.read(0, position)
    with pytest.raises(UnsupportedModelError, match="takes up to 32 query heads a key head, got 33"):
        filled.decode(position)


def test_gradients_are_left_to_the_twin(sequences: Make) -> None:
    filled = Filled(on_device(sequences([LAYOUTS["divisible"]])), KERNELS)
    filled.read(0, filled.sequence.stops[0])
    filled.begin(filled.sequence.stops[0], filled.sequence.stops[0] + 1)
    entries = filled.layer.entries()
    query = filled.sequence.query[:, :, :1].clone().requires_grad_()
    plan, score_mod = filled.state.plan(query, entries), ScoreMod(0.25)
    assert isinstance(plan, KernelPlan) and plan.unfit(query, entries, score_mod) == "has no gradients of decode steps"
    plan.config = replace(KERNELS, backend="auto")
    plan.decode(query, entries, score_mod).output.sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


@torch.no_grad()
def test_biases_are_left_to_the_twin(sequences: Make) -> None:
    sequence = on_device(MORE["biases"](sequences([LAYOUTS["several, text between"]])))
    position = sequence.stops[0]
    filled = Filled(sequence, KERNELS)
    filled.read(0, position)
    filled.begin(position, position + 1)
    query, entries = sequence.query[:, :, position : position + 1], filled.layer.entries()
    score_mod = filled.state.laid(sequence.score_mod(slice(position, position + 1), position + 1))
    plan = filled.state.plan(query, entries)
    with pytest.raises(UnsupportedModelError, match="backend='triton' takes no biases"):
        plan.decode(query, entries, score_mod)
    plan.config = replace(KERNELS, backend="auto")
    expected, _ = sequence.reference(position, KERNELS)
    torch.testing.assert_close(plan.decode(query, entries, score_mod).output[:, :, 0], expected, atol=2e-5, rtol=0)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, gazepatch.ops.plan, gazepatch.backend; print('gazepatch.kernels.ops' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
