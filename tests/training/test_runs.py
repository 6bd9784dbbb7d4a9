"""How a training goes on after a crash or on two processes, and its command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from talking import CONFIG, QUICK, TURNS, arguments, tokens_of, trained

from gazepatch import ArtefactError, GazeConfig, TrainingError
from gazepatch.artefact.manifest import read
from gazepatch.cli import main
from gazepatch.locks import locked
from gazepatch.training.checkpoints import Work, newest_checkpoint
from gazepatch.training.trainer import GazeTrainer

# ---- going on


def killed_at(step: int, base: Path, data: Path, out: Path, settings: dict[str, Any]) -> None:
    """Train in another process, which is killed at the end of a step."""
    code = f"""
import os, signal, torch
from gazepatch.training import trainer
import gazepatch
torch.set_num_threads(1)
def kill(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Lowering.on_step_end = kill
config = gazepatch.GazeConfig.from_dict({CONFIG.to_dict()!r})
gazepatch.train({str(base)!r}, {str(data)!r}, {str(out)!r}, config=config, progress=False, **{settings!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_killed_it_goes_on_from_the_last_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, work = trained(base, data, tmp_path / "whole"), tmp_path / "out", tmp_path / "out.work"
    killed_at(5, base, data, out, QUICK)
    assert not out.exists()
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-4"]
    held = {path.name: path.stat().st_size for path in (work / "checkpoint-4").iterdir()}
    assert set(load_file(work / "checkpoint-4" / "trained.safetensors")) == {"model.language_model.gaze_context_tokens"}
    assert "model.safetensors" not in held and sum(held.values()) < 100_000, held
    # What a process leaves that was killed while it wrote a checkpoint.
    (work / "checkpoint-6").mkdir()
    with pytest.raises(TrainingError, match=r"interrupted, with trainer argument weight_decay None, .* has 0\.5"):
        trained(base, data, out, trainer_arguments={"weight_decay": 0.5})
    with pytest.raises(TrainingError, match=r"out.work holds a training that was interrupted, with seed 0, .* has 1"):
        trained(base, data, out, seed=1)
    steps: list[int] = []
    step = GazeTrainer.training_step
    monkeypatch.setattr(
        GazeTrainer,
        "training_step",
        lambda self, *a, **k: (steps.append(self.state.global_step), step(self, *a, **k))[1],
    )
    trained(base, data, out)
    assert steps == [4, 5]
    assert not work.exists()
    torch.testing.assert_close(tokens_of(out), tokens_of(whole), rtol=0, atol=0)
    assert read(out).provenance == read(whole).provenance


def test_killed_before_the_artefact_is_written(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant: dict[str, Any] = {"trainer_arguments": {"lr_scheduler_type": "constant"}}
    whole = trained(base, data, tmp_path / "whole", **constant)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gazepatch.training.run.save", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(base, data, tmp_path / "out", **constant)
    out = trained(base, data, tmp_path / "out", **constant)
    assert torch.equal(tokens_of(out), tokens_of(whole))
    assert read(out).provenance == read(whole).provenance


def test_what_is_in_the_way_of_the_working_folder(tmp_path: Path) -> None:
    work, ours = tmp_path / "out.work", Work(tmp_path / "out", {"a": 1})

    def opened() -> Path | None:
        with ours.held():
            return ours.open()

    work.write_text("")
    with pytest.raises(TrainingError, match=r"out.work is in the way"):
        opened()
    work.unlink()
    work.mkdir()
    (work / "thesis.txt").touch()
    with pytest.raises(TrainingError, match=r"out.work is in the way"):
        opened()
    (work / "thesis.txt").unlink()
    assert opened() is None
    (newest := work / "checkpoint-2").mkdir()
    ours.complete(2)
    assert opened() == newest
    (work / "run.json").write_text("[")
    with pytest.raises(TrainingError, match=r"run.json is damaged"):
        opened()


def test_before_the_first_checkpoint_settings_may_change(base: Path, data: Path, tmp_path: Path) -> None:
    killed_at(1, base, data, tmp_path / "out", QUICK)
    assert [path.name for path in (tmp_path / "out.work").iterdir()] == ["run.json"]
    (tmp_path / "out.work" / "checkpoint-2").mkdir()  # what is left of one that was being written
    out = trained(base, data, tmp_path / "out", batch_size=4, steps=1)
    assert (read(out).provenance or {})["batch_size"] == 4


def test_paths_may_be_spelt_otherwise_when_it_goes_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(3, base, data, tmp_path / "out", QUICK)
    monkeypatch.chdir(base.parent)
    (tmp_path / "link").symlink_to(data.parent)
    assert trained(Path(base.name), tmp_path / "link" / data.name, tmp_path / "out").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders")
def test_one_training_at_a_time(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work := tmp_path / "out.work").mkdir()
    in_use = pytest.raises(TrainingError, match=r"out\.work is in use: another training for .*out is running; wait")
    with locked(work), in_use:
        trained(base, data, tmp_path / "out")

    def failing(self: Any, **how: Any) -> None:
        with locked(work) as free:
            raise ZeroDivisionError if free is False else AssertionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as failed:
        patch.setattr(GazeTrainer, "train", failing)
        trained(base, data, tmp_path / "out")
    trained(base, data, tmp_path / "out", steps=1)  # although the traceback still holds what the failed one had
    assert failed.tb is not None and not work.exists()


def test_a_place_where_nothing_can_be(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("file/out", "n" * 252):
        with pytest.raises(ArtefactError, match=r"cannot be written: .*; choose another place"):
            trained(base, data, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_room_for_a_checkpoint(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9857792 vs 9857684")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(ArtefactError, match=r"out\.work cannot be written: No space left on device; make room: "):
            trained(base, data, tmp_path / "out", steps=2)
    assert newest_checkpoint(tmp_path / "out.work") is None
    trained(base, data, tmp_path / "out", steps=2)


def test_two_processes_train_as_one(
    base: Path, data: Path, tmp_path: Path, on_two_processes: Callable[..., str]
) -> None:
    # Some records have no image, so that one process may have none; and they are no multiple of an update's.
    talk = data.with_name("mixed.json")
    talk.write_text(json.dumps([*map(json.loads, data.read_text().splitlines()), *[{"messages": TURNS}] * 3]))
    options = ["--region", "2,2,1", "--context-tokens", "2", *arguments(QUICK | {"steps": 7})]
    printed = on_two_processes("-m", "gazepatch.cli", "train", base, talk, "-o", tmp_path / "two", *options)
    one, two = trained(base, talk, tmp_path / "one", steps=7), tmp_path / "two"
    assert (read(two).provenance or {})["processes"] == 2
    torch.testing.assert_close(tokens_of(two), tokens_of(one), rtol=1e-3, atol=1e-3)
    one_loss, two_loss = ((read(folder).provenance or {})["final_loss"] for folder in (one, two))
    assert two_loss == pytest.approx(one_loss, rel=1e-3)
    assert printed.count("Last loss") == 1


# ---- the command


def gaze_train(*args: object) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, args)])


def test_the_command(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = gaze_train(base, data, "-o", out, "--region", "2,2,1", "--budget", "0.25", *arguments(QUICK), "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["training"] == read(out).provenance
    assert printed["gaze"] == GazeConfig.paper(region=(2, 2, 1), budget=0.25).to_dict()
    for figure in ("loss", "budget 0.25", "agreement", "6/6"):
        assert figure in result.stderr
    again = gaze_train(base, data, "-o", out)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1) and "exists already" in again.stderr


USAGE: dict[str, tuple[list[str], str]] = {
    "objective": (["--objective", "x"], "objective must be one of"),
    "budget": (["--budget", "0.0"], "budget must be a share"),
    "steps": (["--steps", "many"], "expected a whole number, such as 8, got 'many'"),
    "trainer": (["--trainer", "bf16"], "--trainer takes NAME=VALUE, got 'bf16'"),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_bad_usage(options: list[str], message: str, tmp_path: Path) -> None:
    result = gaze_train("model", "data.jsonl", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_arguments_of_the_trainer_reach_it(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    train: Callable[..., Any] = GazeTrainer.train
    monkeypatch.setattr(GazeTrainer, "train", lambda self, **k: (seen.append(self.args), train(self, **k)))
    options = ["--region", "2,2,1", *arguments(QUICK | {"steps": 1})]
    result = gaze_train(base, data, "-o", tmp_path / "out", *options, "--trainer", "max_grad_norm=0.5")
    assert result.exit_code == 0, result.output
    assert seen[0].max_grad_norm == 0.5
    refused = gaze_train(
        base, data, "-o", tmp_path / "b", "--trainer", "output_dir=x", "--trainer", "num_train_epochs=2"
    )
    assert refused.exit_code == 2 and "num_train_epochs, output_dir cannot be among" in refused.stderr
