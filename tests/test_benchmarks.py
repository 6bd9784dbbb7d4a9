"""The GPU benchmarks, as far as they run without a GPU: small models, profiles, tuning."""

from __future__ import annotations

import ast
import gc
import itertools
import re
import subprocess
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
import comparing
import decode_gpu
import model_step
import on_gpu
import prefill_gpu
import profiles
import sanitize
import tune
from shapes import DEFAULTS, SETTINGS_OF_STEPS, SMALL, WANTED, WHOLE, tiny
from torch import Tensor
from torch.autograd import DeviceType
from transformers import StaticCache

import gazepatch.kernels.tuned as tuned
from gazepatch.config import GazeConfig
from gazepatch.kernels.settings import architecture, tuned_for
from gazepatch.patch import patched

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ROOT = Path(__file__).parents[1]


# ---- small runs


@pytest.mark.parametrize(
    "name", ["check", "triad", "bandwidth", "dense", "model_step", "prefill", "answers", "profile"]
)
def test_a_dry_run(name: str) -> None:
    tables = decode_gpu.dry_run(DEVICE, [name])
    assert tables[name] and not any("error" in row for row in tables[name])


def test_what_a_step_costs_the_host() -> None:
    script = ROOT / "benchmarks" / "host_step.py"
    run = subprocess.run(
        [sys.executable, script, "--rounds", "1", "--layers", "2"], capture_output=True, text=True, check=True
    )
    assert len(re.findall(r"^.{22} +\d+\.\d+ ms +[+-]\d+\.\d us a layer$", run.stdout, re.M)) == 4


@pytest.mark.parametrize("config", sanitize.SETTINGS, ids=["mean", "max and periphery", "none"])
def test_every_kernel_runs_for_the_sanitizer(config: GazeConfig) -> None:
    output, gradient = sanitize.run(config, DEVICE, torch.float32)
    assert output.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_a_static_step_is_that_of_the_model() -> None:
    assert model_step.check(DEVICE) < 1e-3


class OnDevice(TorchDispatchMode):
    """Fails where a tensor is made on the host, which a CUDA graph would have to copy from."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", f"{operator} on the host"
        return made


def without_data(value: Any, seen: set[int]) -> Any:
    """A cache, or a part of one, with its tensors on a device that has no data: whoever asks for some fails."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {without_data(key, seen): without_data(part, seen) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [without_data(part, seen) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    of_cache = type(value).__module__.startswith(("gazepatch", "transformers.cache_utils"))
    if of_cache and not isinstance(value, GazeConfig) and id(value) not in seen:
        seen.add(id(value))
        for name, part in vars(value).items():
            object.__setattr__(value, name, without_data(part, seen))
    return value


@pytest.mark.skipif(GPU, reason="kernels that are not interpreted need a GPU's tensors")
@pytest.mark.parametrize(
    ("side", "backend"),
    [("transformers", ""), ("flash", ""), *itertools.product((*WANTED, DEFAULTS, WHOLE), ("torch", "triton"))],
)
@torch.no_grad()
def test_a_step_of_the_whole_model_can_be_captured(side: str, backend: str) -> None:
    model, grid = model_step.model_of(SMALL, torch.float32, DEVICE), (2, 11, 12)
    way = patched(model, replace(SETTINGS_OF_STEPS[side], backend=backend)) if backend else None
    tokens = 2 * 11 * 12 + on_gpu.TEXT
    with way or model_step.way_of(model, side, tokens + 1):
        cache, _ = model_step.filled(model, grid, 2)
        model_step.step_with(model, cache, tokens, 2)()  # what the first call may make
        model.to("meta")
        without_data(cache, set())
        step = model_step.step_with(model, cache, tokens, 2)
        with OnDevice():
            assert step().shape == (2, 1, SMALL.words)


@torch.no_grad()
def test_one_cache_at_a_time() -> None:
    model, grid = model_step.model_of(SMALL, torch.float32, DEVICE), (1, 12, 12)

    def caches() -> int:
        return sum(type(each) is StaticCache for each in gc.get_objects())

    gc.collect()  # what other tests have left
    held = caches()
    row = model_step.dense_ms(model, grid, 2)
    assert isinstance(row["dense_ms"]["transformers"], float)
    assert isinstance(row["dense_ms"]["cudnn"], str)  # what a machine does not have says why
    assert "ms" in model_step.gaze_ms(model, grid, 2, "64, paper")
    gc.collect()  # as between rows
    assert caches() <= held
    assert model.config.text_config._attn_implementation == "sdpa"


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_step, "lacking", lambda wanted, device, what: f"does not fit: {wanted}")
    cases = list(model_step.model_step(tiny(DEVICE), model_step.Models(tiny(DEVICE))))
    assert "does not fit" in cases[0].measure()["skipped"]
    assert cases[0].key == {"side": "dense", "batch": 1, "visual": "128k"}


def test_the_prompt_is_found_and_read_by_gaze() -> None:
    model = model_step.model_of(SMALL, torch.float32, DEVICE)
    inputs = prefill_gpu.prompt(model.config, 2, 8, DEVICE)
    features = torch.randn(2 * 64, SMALL.hidden).to(DEVICE)
    step = {"input_ids": torch.tensor([[5]]).to(DEVICE), "position_ids": torch.full((3, 1, 1), 300).to(DEVICE)}
    with prefill_gpu.without_tower(model, features), torch.no_grad():
        dense = model(**inputs, use_cache=True)
        with patched(model, prefill_gpu.SIDES["patched"]):
            ours = model(**inputs, use_cache=True)
            spans = ours.past_key_values.gaze.spans
            assert [span.grid for span in spans] == [(1, 8, 8)] * 2
            assert model(**step, past_key_values=ours.past_key_values).logits.isfinite().all()
        with patched(model, prefill_gpu.SIDES["routed"]):
            routed = model(**inputs, use_cache=True)
    torch.testing.assert_close(ours.logits, dense.logits)
    assert not torch.allclose(routed.logits, dense.logits, atol=1e-6)
    assert "forward" not in vars(model.model.visual)


def test_shares_are_medians_of_rounds() -> None:
    row = prefill_gpu.summarised(
        {"dense": [100.0, 200.0, 300.0], "patched": [101.0, 204.0, 330.0], "routed": [90.0] * 3}
    )
    assert row["overhead"] == pytest.approx(0.02) and row["overhead_most"] == pytest.approx(0.1)
    assert row["dense_ms"] == 200.0 and row["rounds"] == 3


def test_a_profile_adds_up_by_kernel() -> None:
    def event(key: str, device: DeviceType, count: int, us: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(key=key, device_type=device, count=count, self_device_time_total=us)

    averages = [
        event("select_kernel", DeviceType.CUDA, 20, 100.0),
        event("decode_kernel", DeviceType.CUDA, 20, 400.0),
        event("cudaGraphLaunch", DeviceType.CPU, 5, 0.0),
    ]
    found = profiles.summed(averages, steps=10)
    assert found == {"decode_kernel": {"launches": 2.0, "us": 40.0}, "select_kernel": {"launches": 2.0, "us": 10.0}}
    assert "no kernels recorded" in profiles.kernels_of([lambda: None])["skipped"]
    (row, _) = comparing.kernels({"profile": [{"step": "attention", "batch": 1, "kernels": found, "gpu": "H100"}]})
    assert row == {"step": "attention", "batch": 1, "launches": 2.0, "us": 40.0, "kernel": "decode_kernel"}


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ("graph", "replays of a graph"),
        (["call", "call"], "calls"),
        ("nothing at all", "no kernels recorded: CUPTI is not available here, or another profiler holds it"),
        (RuntimeError("CUPTI is\nlost"), "no kernels recorded: RuntimeError: CUPTI is"),
    ],
    ids=["graphs", "calls alone", "nothing", "it fails"],
)
def test_a_profile_where_not_everything_can_be_recorded(seen: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(call: Any) -> list[Any]:
        if isinstance(seen, Exception):
            raise seen
        kernel = types.SimpleNamespace(key="k", device_type=DeviceType.CUDA, count=10, self_device_time_total=50.0)
        return [kernel] if call() == seen else []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiles, "captured", lambda steps: lambda: "graph")
    monkeypatch.setattr(profiles, "_recorded", recorded)
    row = profiles.kernels_of([lambda: "call"] * 2)
    assert row.get("recorded", row.get("skipped")) == said
    if "kernels" in row:
        assert row["kernels"] == {"k": {"launches": 1.0, "us": 5.0}} and row["us"] == 5.0


@pytest.mark.skipif(GPU, reason="stands in for a GPU")
def test_what_is_asked_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not one that computes: only the order of what a graph and its timing need.
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("event")

        def synchronize(self) -> None:
            asked.append("wait")

        def elapsed_time(self, stop: Any) -> float:
            return 6.0

    class Stream:
        def wait_stream(self, other: Any) -> None:
            asked.append("stream")

    graph = types.SimpleNamespace(replay=lambda: asked.append("replay"))
    for name, stand_in in {
        "is_available": lambda: True,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph: nullcontext(),
        "CUDAGraph": lambda: graph,
        "Event": Event,
        "synchronize": lambda: asked.append("wait"),
        "_sleep": lambda cycles: asked.append("busy"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (3 << 30, 4 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    ms = on_gpu.graph_ms([lambda: asked.append("step")] * 2, rounds=25, seconds=0.06)
    capture = ["stream", *["step"] * 4, "stream", "wait", *["step"] * 2]
    assert ms == 3.0 and asked == capture + ["wait", "busy", "event", "replay", "event", "wait"] * (3 + 10)
    cuda = torch.device("cuda")
    assert on_gpu.lacking(1 << 30, cuda, "two tensors") is None
    assert on_gpu.lacking(5 << 30, cuda, "two tensors") == (
        "does not fit: two tensors take 5.0 GiB, 3.0 of 4.0 GiB are free"
    )


# ---- tuning


def test_settings_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune, "CASES", ((1, 1, 32, 8), (2, 1, 4, 2)))
    monkeypatch.setattr(tuned, "DECODE", dict(tuned.DECODE))
    ran = tune.tune(64, 4, DEVICE, 0.0)
    assert [settings for _, settings in ran] == [tuple(tuned_for(architecture(DEVICE), 64, 4))]


def test_settings_are_compiled_by_other_processes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    present = (16, 1, 2, 2, False)
    monkeypatch.setattr(tune, "candidates", lambda *_: [present])
    tune.compile_ahead(64, 4, present)
    said = capfd.readouterr().err
    assert "(16, 1, 2, 2, False)" not in said  # or it would say why it does not run
    assert "(16, 1, 2, 2, True)" in said or DEVICE.type == "cuda"  # interpreted, nothing is launched early


def test_the_search_stops_and_keeps_what_ran(capsys: pytest.CaptureFixture[str]) -> None:
    present = (64, 4, 3, 2, False)

    def us(settings: tuple[int, ...]) -> float | None:
        block, warps, stages, programs, early = settings
        return None if block == 128 else 100.0 - block / 8 + warps + stages + (0 if programs == 3 else 5) - early

    ran = tune.search(present, 128, 2, us, float("inf"))
    assert ran[0] == (100.0 - 8 + 2 + 2 - 1, (64, 2, 2, 3, True)) and len(ran) == 9 + 4 * 3 + 4
    assert len(tune.candidates(128, 2, present)) == 18
    # Rows that one warp cannot hold are shared among all: there are no parts of 16 entries.
    assert (16, 8, 3, 1, False) in tune.candidates(256, 2, present)
    (only,) = tune.search(present, 128, 2, us, 0.0)
    assert only[1] == present and "not all candidates ran" in capsys.readouterr().err


def test_settings_are_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "tuned.py"
    path.write_text(Path(tuned.__file__).read_text())
    keys = [("cuda90", 128, 2), ("cuda90", 64, 4)]
    tune.write(path, {keys[0]: (32, 8, 4, 1, True), keys[1]: (16, 4, 2, 3, False)}, "measured on H100, triton 3.6.0")
    tune.write(path, {keys[0]: (128, 4, 2, 1, False)}, "measured on H200, triton 3.6.0")
    text = path.read_text()
    module: dict[str, Any] = {}
    exec(compile(ast.parse(text), str(path), "exec"), module)
    assert module["DECODE"] == tuned.DECODE | {keys[0]: (128, 4, 2, 1, False)}
    assert text.count("#: cuda90, head dim 128, 2 bytes: measured on H200") == 1
    assert (
        text.count("#: cuda90, head dim 64, 4 bytes: measured on H100") == 1
        and "head dim 128, 2 bytes: measured on H100" not in text
    )
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), str(path)]
    if subprocess.run([*ruff[:3], "--version"], capture_output=True).returncode == 0:
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- without an installation


def test_a_checkout_is_enough(tmp_path: Path) -> None:
    # An interpreter that sees what the package needs, but no gazepatch: as on a machine where nothing can be installed.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        "import importlib.util; assert importlib.util.find_spec('gazepatch') is None\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); before = list(sys.path); import checkout\n"
        "assert sys.path == before, 'other folders of the checkout would be found too'\n"
        "import gazepatch.adapters.base, gazepatch.cli, gazepatch.caches.static\n"
        "print(gazepatch.adapters.__file__, gazepatch.cli.__file__, sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if "find_spec('gazepatch') is None" in run.stderr:
        pytest.skip("gazepatch is installed as files")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(ROOT / "adapters" / "__init__.py"), str(ROOT / "cli" / "__init__.py")]
