"""Models that FSDP2 spreads over processes learn what one process does, and leave whole tensors behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import DistributedType
from safetensors.torch import load_file
from talking import CONFIG, QUICK, TURNS, trained

import gazepatch
from gazepatch import ConfigError
from gazepatch.artefact.manifest import read
from gazepatch.lora import missing_peft
from gazepatch.training.sharded import fsdp_wanted

TRAININGS: dict[str, dict[str, Any]] = {
    "context": {"accumulate": 2, "trainer_arguments": {"gradient_checkpointing": True}},
    "lora": {"trainable": "lora", "learning_rate": 0.01, "stop_at": 5},
    "full": {"trainable": "full", "learning_rate": 0.001, "stop_at": 5},
}
if missing_peft():
    del TRAININGS["lora"]


@pytest.fixture(scope="module")
def talk(data: Path) -> Path:
    """Conversations of which some have no image, so that one process may have none where the other has."""
    path = data.with_name("mixed.json")
    path.write_text(json.dumps([*map(json.loads, data.read_text().splitlines()), *[{"messages": TURNS}] * 4]))
    return path


@pytest.fixture(scope="module")
def spread(
    base: Path, talk: Path, tmp_path_factory: pytest.TempPathFactory, on_two_processes: Callable[..., str]
) -> Path:
    """The folder of all trainings on two processes, started once."""
    folder = tmp_path_factory.mktemp("spread")
    calls = [QUICK | {"batch_size": 4} | values | {"out": str(folder / name)} for name, values in TRAININGS.items()]
    calls = [call | {"trainer_arguments": call.get("trainer_arguments", {}) | {"fsdp": True}} for call in calls]
    program = Path(__file__).with_name("spread_on_cpu.py")
    on_two_processes(program, base, talk, json.dumps(CONFIG.to_dict()), json.dumps(calls))
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_with_shards_train_as_one(
    name: str,
    base: Path,
    talk: Path,
    spread: Path,
    tmp_path: Path,
) -> None:
    values = {key: value for key, value in TRAININGS[name].items() if key != "stop_at"}
    one, two = trained(base, talk, tmp_path / "one", **{"batch_size": 4, **values}), spread / name
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(two) for path in two.rglob("*.safetensors"))
    for file in files:
        expected, found = load_file(one / file), load_file(two / file)
        before = started(base, file.name, expected)
        assert found.keys() == expected.keys()
        learned = sum((expected[key] - before[key]).square().sum() for key in expected if key in before)
        apart = sum((found[key] - expected[key]).square().sum() for key in expected)
        assert learned > 0 and apart < 1e-3 * learned
    first, second = (dict(read(folder).provenance or {}) for folder in (one, two))
    assert (first.pop("processes"), second.pop("processes")) == (1, 2)
    assert second.pop("final_loss") == pytest.approx(first.pop("final_loss"), rel=1e-3)
    assert second == first
    assert not two.with_name(f"{name}.work").exists()


def started(base: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the tensors of a file are before a training; of adapters, the half that starts at zero."""
    if name == "model.safetensors":
        return load_file(base / name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    if name == "context_tokens.safetensors":
        return {"context_tokens": gazepatch.initial_context_tokens(model, 2)}
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if "lora_B" in key}


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"fsdp": True}, {}, "torchrun --nproc-per-node N"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "fsdp must be FSDP2"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "accelerate launch --fsdp_version 2"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, {}, "give gradient_checkpointing=true"),
        ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, {}, "without weights"),
        ({"deepspeed": "zero.json"}, {}, "deepspeed cannot train here"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed cannot train here"),
    ],
)
def test_what_is_refused(
    given: dict[str, Any],
    environment: dict[str, str],
    message: str,
    base: Path,
    talk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # put back what TrainingArguments change
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        trained(base, talk, tmp_path / "out", trainer_arguments=given)
    assert not (tmp_path / "out.work").exists()


def test_shards_of_cpus_are_refused(base: Path, talk: Path) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    asked = SimpleNamespace(fsdp=True, fsdp_plugin_args={"fsdp_version": 2}, world_size=2, distributed_state=state)
    with pytest.raises(ConfigError, match="fsdp is for GPUs"):
        fsdp_wanted(asked)  # type: ignore[arg-type]
