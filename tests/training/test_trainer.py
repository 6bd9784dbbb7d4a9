"""What a training learns: dense reading, budgets, settings, objectives, and what it leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import needs_peft
from safetensors.torch import load_file, save_file
from talking import CONFIG, TURNS, agreement, tokens_of, trained
from tiny import tiny

import gazepatch
from gazepatch import (
    ArtefactError,
    CacheError,
    ConfigError,
    GazeConfig,
    HubError,
    PatchError,
    TrainConfig,
    TrainingError,
)
from gazepatch.artefact.manifest import read
from gazepatch.demo.checkpoint import CHAT_TEMPLATE
from gazepatch.patch import dense, patch_of, set_budget
from gazepatch.training.order import Shuffled
from gazepatch.training.records import read_records
from gazepatch.training.schedule import Schedule
from gazepatch.training.trainer import GazeTrainer

# ---- reading densely, and other budgets, without taking the patch off


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_dense_is_the_unpatched_model_bit_for_bit(family: str) -> None:
    case = tiny(family)
    before = case.model(**case.inputs).logits
    answer = case.model.generate(**case.inputs, max_new_tokens=4)
    tokens = gazepatch.initial_context_tokens(case.model, 2)
    gazepatch.apply(case.model, GazeConfig.paper(region=(2, 2, 1), context_tokens=2), context_tokens=tokens)
    gazing = case.model(**case.inputs).logits
    assert not torch.equal(gazing, before)
    with dense(case.model):
        assert torch.equal(case.model(**case.inputs).logits, before)
        with dense(case.model):
            assert torch.equal(case.model(**case.inputs).logits, before)
        assert torch.equal(case.model.generate(**case.inputs, max_new_tokens=4), answer)
    assert torch.equal(case.model(**case.inputs).logits, gazing)


@torch.no_grad()
def test_a_cache_stays_on_its_side_of_dense() -> None:
    case = tiny("llava")
    gazepatch.apply(case.model, min_visual_tokens=0)
    step = {"input_ids": torch.tensor([[9]])}
    gazed = case.model(**case.inputs, use_cache=True).past_key_values
    with dense(case.model):
        with pytest.raises(CacheError, match="filled by a patched model"):
            case.model(**step, past_key_values=gazed)
        plain = case.model(**case.inputs, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="filled by a model that was not patched"):
        case.model(**step, past_key_values=plain)


def test_dense_ends_with_an_error() -> None:
    case = tiny("llava")
    with pytest.raises(PatchError, match="not patched"), dense(case.model):
        pass
    gazepatch.apply(case.model)
    with pytest.raises(KeyError), dense(case.model):
        raise KeyError
    assert not patch_of(case.model).runtime.running.dense


def test_dense_blocks_may_end_in_any_order() -> None:
    case = tiny("llava")
    gazepatch.apply(case.model)
    running, first, second = patch_of(case.model).runtime.running, dense(case.model), dense(case.model)
    for change in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        change()
        assert running.dense
    second.__exit__(None, None, None)
    assert not running.dense


@torch.no_grad()
def test_the_budget_can_change_under_an_optimiser() -> None:
    case = tiny("llava")
    tokens = torch.nn.Parameter(gazepatch.initial_context_tokens(case.model, 2))
    gazepatch.apply(case.model, CONFIG, context_tokens=tokens, budget=3)
    expected = case.model(**case.inputs).logits
    set_budget(case.model, 1.0)
    assert not torch.equal(case.model(**case.inputs).logits, expected)
    assert gazepatch.context_tokens_of(case.model) is tokens
    set_budget(case.model, 3)
    assert torch.equal(case.model(**case.inputs).logits, expected)
    assert patch_of(case.model).config.budget == 3
    with pytest.raises(ConfigError, match="budget must be"):
        set_budget(case.model, 0.0)
    assert patch_of(case.model).config.budget == 3


# ---- the schedule


@pytest.mark.parametrize(
    ("final", "share", "stages"),
    [
        (0.125, 0.5, ((0, 1.0), (16, 0.5), (33, 0.25), (50, 0.125))),
        (0.1, 0.4, ((0, 1.0), (10, 0.8), (20, 0.4), (30, 0.2), (40, 0.1))),
        (2, 1.0, ((0, 1.0), (25, 16), (50, 8), (75, 4), (100, 2))),
        (0.6, 0.5, ((0, 1.0), (50, 0.6))),
        (0.1, 0.0, ((0, 0.1),)),
        (1.0, 0.5, ((0, 1.0),)),
    ],
)
def test_schedule(final: float | int, share: float, stages: tuple[tuple[int, float | int], ...]) -> None:
    schedule = Schedule.falling(final, steps=100, share=share)
    assert schedule.stages == stages
    for first, budget in stages:
        assert schedule.budget(first) == budget
        assert type(schedule.budget(first)) is type(budget)
    assert schedule.budget(1000) == stages[-1][1]


def test_a_short_training_ends_with_the_final_budget() -> None:
    assert Schedule.falling(0.1, steps=1, share=0.5).budget(0) == 0.1


# ---- settings

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "nonsense"}, "objective must be one of distill, next-token, got 'nonsense'"),
    "trainable": ({"trainable": "tower"}, "trainable must be one of context, lora, full"),
    "steps": ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    "epochs": ({"epochs": -1.0}, "epochs must be a number above 0"),
    "rate": ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
    "rate of context tokens": ({"context_learning_rate": 0.01}, "context_learning_rate is for lora and full"),
    "schedule": ({"schedule": 1.5}, "schedule must be a number from 0 to 1"),
    "batch": ({"batch_size": True}, "batch_size must be an integer"),
    "parts": ({"batch_size": 3, "accumulate": 2}, "batch_size must be a multiple of accumulate, got 3 and 2"),
    "unknown": ({"learning_speed": 1}, "unknown training setting learning_speed; known: objective"),
    "of the gaze": ({"budget": 0.5}, "budget cannot be among the settings of a training"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        gazepatch.train("model", "data.jsonl", tmp_path / "out", **settings)


def test_settings_must_fit_each_other(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="prefill must be 'gaze'"):
        trained(base, data, out, replace(CONFIG, prefill="dense"))
    with pytest.raises(ConfigError, match="context_tokens must be at least 1"):
        trained(base, data, out, replace(CONFIG, context_tokens=0))
    with pytest.raises(ConfigError, match="max_steps cannot be among the trainer's arguments"):
        trained(base, data, out, trainer_arguments={"max_steps": 3})
    with pytest.raises(ConfigError, match=r"transformers refuses the trainer's arguments: .*nonsense"):
        trained(base, data, out, trainer_arguments={"nonsense": 3})
    with pytest.raises(ConfigError, match="batch_size must be a multiple of processes x accumulate = 2 x 2, got 6"):
        TrainConfig(batch_size=6, accumulate=2).per_device(2)
    assert not out.exists() and not (tmp_path / "out.work").exists()


def test_an_artefact_is_not_trained(base: Path, data: Path, tmp_path: Path) -> None:
    for name, full in (("adapter", False), ("full", True)):
        artefact = gazepatch.convert(base, tmp_path / name, full=full)
        with pytest.raises(ArtefactError, match=f"got {artefact}, which is an artefact of gazepatch already: take "):
            trained(artefact, data, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "full"]


def test_outputs_that_are_refused_before_the_training(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ArtefactError, match="exists already"):
        trained(base, data, tmp_path)
    with pytest.raises(ArtefactError, match="outside the base model"):
        trained(base, data, base / "out")
    with pytest.raises(HubError, match="expected a folder or a Hub id"):
        trained(tmp_path / "none", data, tmp_path / "out")


def test_a_model_without_a_processor_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(base, tmp_path / "alone"))
    (alone / "processor_config.json").unlink()
    with pytest.raises(ArtefactError, match=r"the processor of .*alone cannot be loaded.*must lie beside the model's"):
        trained(alone, data, tmp_path / "out")
    shutil.copytree(base, tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink()
    with pytest.raises(ArtefactError, match=r"the processor of .*silent has no chat template"):
        trained(tmp_path / "silent", data, tmp_path / "out")


def test_steps() -> None:
    assert TrainConfig(batch_size=4).steps_for(9) == 3
    assert TrainConfig(batch_size=4, epochs=0.1).steps_for(9) == 1
    assert TrainConfig(batch_size=4, epochs=1.5).steps_for(9) == 5
    assert TrainConfig(steps=7).steps_for(9) == 7


# ---- training


def test_training_raises_agreement_with_dense(base: Path, data: Path, tmp_path: Path, processor: Any) -> None:
    config = replace(CONFIG, context_tokens=8)
    settings: dict[str, Any] = {"steps": 40, "batch_size": 4, "learning_rate": 0.1, "save_every": 100}
    out = trained(base, data, tmp_path / "out", config, **settings)
    assert not (tmp_path / "out.work").exists()
    model = gazepatch.load(out)
    after = agreement(model, processor, data)
    tokens = gazepatch.initial_context_tokens(gazepatch.restore(model), 8)
    with gazepatch.patched(model, config, context_tokens=tokens):
        untrained = agreement(model, processor, data)
    with gazepatch.patched(model, replace(config, context_tokens=0)):
        without = agreement(model, processor, data)
    assert after >= max(untrained, without) + 0.1


def test_the_artefact_says_how_it_came_about(base: Path, data: Path, tmp_path: Path) -> None:
    out = trained(base, data, tmp_path / "out", seed=3)
    manifest = read(out)
    assert manifest.gaze == CONFIG and manifest.base_model == str(base)
    provenance = dict(manifest.provenance or {})
    assert provenance["versions"]["transformers"] == transformers.__version__
    expected = {"objective": "distill", "trainable": "context", "steps": 6, "epochs": 1.5, "batch_size": 2, "seed": 3}
    expected |= {"data": "talk.jsonl", "records": 8, "processes": 1, "learning_rate": 0.05}
    expected |= {"budgets": [[0, 1.0], [1, 0.5], [2, 0.25], [3, 0.125]], "data_digest": read_records(data).digest}
    assert expected.items() <= provenance.items()
    assert provenance["final_loss"] > 0 and 0 <= provenance["final_agreement_in_training"] <= 1
    assert '"objective": "distill"' in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {"README.md", "context_tokens.safetensors", "gaze_config.json"}
    first = gazepatch.initial_context_tokens(gazepatch.restore(gazepatch.load(out)), 2, seed=3)
    assert not torch.allclose(tokens_of(out), first, atol=1e-3)


def test_next_token_lowers_the_loss_and_logs(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[dict[str, Any]] = []
    log = GazeTrainer.log
    monkeypatch.setattr(GazeTrainer, "log", lambda self, entry, t=None: (log(self, entry, t), logs.append(entry)))
    trained(base, data, tmp_path / "out", objective="next-token", steps=20, batch_size=8, learning_rate=0.1)
    logs = [entry for entry in logs if "agreement" in entry]
    assert len(logs) == 10
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.1
    assert [entry["budget"] for entry in logs] == [1.0, 0.5, 0.5, 0.25, 0.25, *[0.125] * 5]
    assert logs[0]["agreement"] > 0


def test_accumulation_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    whole = trained(base, data, tmp_path / "whole", batch_size=4)
    parts = trained(base, data, tmp_path / "parts", batch_size=4, accumulate=2)
    torch.testing.assert_close(tokens_of(parts), tokens_of(whole), rtol=1e-3, atol=1e-3)


def test_every_record_is_read_as_often() -> None:
    order = list(Shuffled(5, 12, seed=3))
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and len(order) == 12
    assert order[:5] != order[5:10]
    assert list(Shuffled(5, 7, seed=3)) == order[:7]


def test_some_records_need_an_image(base: Path, data: Path, tmp_path: Path) -> None:
    path, plain = tmp_path / "plain.jsonl", json.dumps({"messages": TURNS, "image_path": "0.png"}) + "\n"
    path.write_text(plain * 2)
    keys = r"no record of .*plain\.jsonl has an image: expected .* got the keys messages, image_path in .*, line 1"
    with pytest.raises(TrainingError, match=keys):
        trained(base, path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["plain.jsonl"]
    (mixed := data.with_name("mixed.jsonl")).write_text(plain * 2 + data.read_text().splitlines()[0])
    out = trained(base, mixed, tmp_path / "out", steps=3, batch_size=1, schedule=0.0)
    first = gazepatch.initial_context_tokens(gazepatch.restore(gazepatch.load(out)), 2)
    assert not torch.allclose(tokens_of(out), first, atol=1e-3)


def test_a_loss_that_is_not_finite_ends_the_training(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gazepatch.training.trainer.distill", lambda student, teacher: student.sum() * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 2: lower the learning rate"):
        trained(base, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_peft
def test_lora(base: Path, data: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"trainable": "lora", "steps": 30, "batch_size": 4, "learning_rate": 0.01}
    out = trained(base, data, tmp_path / "out", **settings, save_every=100)
    dense_model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    model = gazepatch.load(out)
    after = agreement(model, processor, data, dense_model)
    with gazepatch.patched(dense_model, CONFIG, context_tokens=tokens_of(out)):
        before = agreement(dense_model, processor, data)
    assert after >= before + 0.1
    again = gazepatch.save(model, tmp_path / "again")
    saved, first = (load_file(folder / "lora" / "adapter_model.safetensors") for folder in (again, out))
    assert all(torch.equal(saved[name], first[name]) for name in first | saved)
    key = min(first)
    for keys, what in (
        ({k: v for k, v in first.items() if k != key}, "got 1 missing keys"),
        (first | {key.replace("layers.0", "layers.9"): first[key].clone()}, "got 1 unexpected keys"),
        (first | {key: torch.zeros(3, 3)}, "lora must"),
    ):
        save_file(keys, again / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtefactError, match=what):
            gazepatch.load(again)
    monkeypatch.setattr("gazepatch.lora.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match="need the package peft"):
        gazepatch.load(out)
    (out / "lora").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="must hold the folder lora"):
        gazepatch.load(out)


@needs_peft
def test_without_context_tokens(base: Path, data: Path, tmp_path: Path) -> None:
    out = trained(base, data, tmp_path / "out", replace(CONFIG, context_tokens=0), trainable="lora", steps=2)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "gaze_config.json", "lora"]
    assert gazepatch.inspect(gazepatch.load(out)).settings.context_tokens == 0


def test_lora_needs_peft(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gazepatch.lora.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(TrainingError, match="pip install peft"):
        trained(base, data, tmp_path / "out", trainable="lora")


def test_full(base: Path, data: Path, tmp_path: Path, processor: Any) -> None:
    out = trained(base, data, tmp_path / "first", trainable="full", steps=30, batch_size=4, learning_rate=0.003)
    out = out.rename(tmp_path / "moved")  # it brings its base model, wherever it is
    assert read(out).full
    dense_model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    after = agreement(gazepatch.load(out), processor, data, dense_model)
    with gazepatch.patched(dense_model, CONFIG, context_tokens=tokens_of(out)):
        before = agreement(dense_model, processor, data)
    assert after >= before + 0.1
    assert transformers.AutoProcessor.from_pretrained(out).chat_template == CHAT_TEMPLATE


def test_weights_learn_in_single_precision(base: Path, data: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    settings: dict[str, Any] = {"trainable": "full", "steps": 8, "batch_size": 4, "learning_rate": 1e-5}
    found, single = (
        load_file(trained(source, data, tmp_path / name, **settings) / "model.safetensors")
        for source, name in ((half, "from half"), (single_of(half, tmp_path / "single"), "from single"))
    )
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    before = load_file(half / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in single.items()}
    moved = sum(int((rounded[name] != before[name]).sum()) for name in before)
    equal = sum(int(((rounded[name] != before[name]) & (found[name] == rounded[name])).sum()) for name in before)
    assert moved > 1000 and equal > 0.8 * moved  # the teacher is rounded


def single_of(half: Path, folder: Path) -> Path:
    """The same weights, on disk in single precision."""
    shutil.copytree(half, folder)
    transformers.AutoModelForImageTextToText.from_pretrained(half, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_full_on_the_data_alone_needs_no_second_model(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gazepatch.training.run._teacher", None)
    settings: dict[str, Any] = {"trainable": "full", "objective": "next-token", "steps": 2, "log_every": 2}
    provenance = read(gazepatch.train(base, data, tmp_path / "out", config=CONFIG, **settings)).provenance or {}
    assert provenance["final_loss"] > 0 and provenance["final_agreement_in_training"] is None
    assert "train: step 2/2, loss" in (said := capsys.readouterr().err) and "agreement" not in said


def test_context_tokens_learn_at_a_rate_of_their_own(base: Path, data: Path, tmp_path: Path) -> None:
    first = gazepatch.initial_context_tokens(transformers.AutoModelForImageTextToText.from_pretrained(base), 2)
    before = load_file(base / "model.safetensors")
    moved = []
    for weights, tokens in ((1e-9, 0.01), (0.01, 1e-9)):
        name, settings = f"out {tokens}", {"learning_rate": weights, "context_learning_rate": tokens}
        out = trained(base, data, tmp_path / name, trainable="full", steps=2, batch_size=4, **settings)
        after = load_file(out / "model.safetensors")
        assert read(out).provenance.items() >= settings.items()
        moved.append((max((after[n] - before[n]).abs().max() for n in before), (tokens_of(out) - first).abs().max()))
    assert moved[0][0] < 1e-6 < 1e-3 < moved[0][1]
    assert moved[1][1] < 1e-6 < 1e-3 < moved[1][0]
