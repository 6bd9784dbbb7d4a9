"""Steps that are launched as the step before them was: the same arguments, and the same results."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from on_kernels import DEVICE, GPU
from stepping import SETTINGS, generate
from tiny import Case, batch, tiny

from gazepatch.config import GazeConfig
from gazepatch.errors import UnsupportedModelError
from gazepatch.kernels.launch import CachedLaunch, Launch
from gazepatch.kernels.repeated import Repeated
from gazepatch.patch import patched, stats

ROOT = Path(__file__).parents[1]


class Interpreted:
    """Code of a kernel for the interpreter, which returns none."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.kernel[grid](**dict(zip(self.names, arguments, strict=True)))

    @property
    def names(self) -> list[str]:
        return list(inspect.signature(self.kernel.fn).parameters)


class Ran:
    """How many launches were made again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.again, launch, again = 0, Launch.run, CachedLaunch.run

        def interpreted(of: Launch, device: torch.device) -> Any:
            return launch(of, device) or Interpreted(of.kernel)

        def counted(of: CachedLaunch, *args: Any) -> None:
            self.again += 1
            again(of, *args)

        monkeypatch.setattr(Launch, "run", interpreted)
        monkeypatch.setattr(CachedLaunch, "run", counted)


def on_its_device(case: Case) -> Case:
    model = copy.deepcopy(case.model).to(DEVICE)
    inputs = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in case.inputs.items()}
    return replace(case, model=model, inputs=inputs)


def answered(case: Case, config: GazeConfig, steps: int, **settings: Any) -> tuple[torch.Tensor, Any]:
    with torch.no_grad(), patched(case.model, config, backend="triton"):
        logits = torch.stack(generate(case, steps, disable_compile=True, **settings).logits)
        return logits, stats(case.model)


def equal_anew(case: Case, config: GazeConfig, monkeypatch: pytest.MonkeyPatch, steps: int = 5, **settings: Any) -> int:
    """Answers by repeated launches are those of launches anew; returns how many launches were made again."""
    case, ran = on_its_device(case), Ran(monkeypatch)
    repeated = answered(case, config, steps, **settings)
    launches = ran.again
    monkeypatch.setattr(Repeated, "fits", lambda *_: False)
    anew = answered(case, config, steps, **settings)
    assert ran.again == launches
    torch.testing.assert_close(repeated[0], anew[0], rtol=0, atol=1e-4 if GPU else 0)
    assert repeated[1] == anew[1]
    return launches


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["quarter", "periphery", "gaze prefill"])
@pytest.mark.parametrize("rows", [1, 2])
def test_repeated_steps(rows: int, name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny("llava") if rows == 1 else batch(tiny("llava"))
    launches = equal_anew(case, SETTINGS[name], monkeypatch, cache_implementation=cache)
    assert launches == 2 * 2 * 2  # a layer, of two; the first two steps are launched anew, and none follows the last


def test_a_store_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gazepatch.caches.layer.MIN_ROOM", 3)
    launches = equal_anew(tiny("llava"), SETTINGS["quarter"], monkeypatch, steps=10)
    assert 0 < launches < 2 * 2 * 7


def test_beams_have_other_memory_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert equal_anew(tiny("qwen2_5_vl"), SETTINGS["periphery"], monkeypatch, num_beams=2) == 0


@torch.no_grad()
def test_a_copy_of_a_cache_repeats_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ran = on_its_device(tiny("llava")), Ran(monkeypatch)
    monkeypatch.setattr(Interpreted, "__deepcopy__", lambda *_: pytest.fail("code was copied"), raising=False)
    token = torch.tensor([[5]], device=DEVICE)
    with patched(case.model, SETTINGS["quarter"], backend="triton"):
        cache = case.model(**case.inputs, use_cache=True).past_key_values

        def step(of: Any) -> torch.Tensor:
            return case.model(input_ids=token, past_key_values=of).logits

        for _ in range(3):
            step(cache)
        other, launches = copy.deepcopy(cache), ran.again
        assert launches > 0
        expected = [step(cache) for _ in range(3)]
        torch.testing.assert_close([step(other) for _ in range(3)], expected)
        assert ran.again == launches + 3 * launches + launches  # the first two steps of the copy are launched anew


def test_gradients_take_no_launch_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ran = on_its_device(tiny("llava")), Ran(monkeypatch)
    token = torch.tensor([[5]], device=DEVICE)
    with patched(case.model, SETTINGS["quarter"], backend="triton"), torch.no_grad():
        out = case.model(**case.inputs, use_cache=True)
        for _ in range(3):
            case.model(input_ids=token, past_key_values=out.past_key_values)
        before = ran.again
        assert before > 0
        with torch.enable_grad(), pytest.raises(UnsupportedModelError, match="has no gradients of decode steps"):
            case.model(input_ids=token, past_key_values=out.past_key_values)
        assert ran.again == before


@pytest.mark.skipif(GPU, reason="compiles for a GPU that is not there")
def test_repeated_launches_hand_on_what_triton_would() -> None:
    folders = [str(ROOT / name) for name in ("tests", "benchmarks")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*folders, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "launched_twice.py"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "48"
