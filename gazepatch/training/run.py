"""`train`: from a model and conversations about images to an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from gazepatch.artefact.finding import base_config, refuse_artefact
from gazepatch.artefact.folders import check_output
from gazepatch.artefact.making import save
from gazepatch.artefact.weights import load_model
from gazepatch.config import GazeConfig, settings_of
from gazepatch.context import initial_context_tokens
from gazepatch.errors import ConfigError, TrainingError
from gazepatch.layers import gaze_layers
from gazepatch.lora import require_peft
from gazepatch.patch import apply, set_budget
from gazepatch.processors import open_processor
from gazepatch.registry import adapter_for
from gazepatch.training.arguments import arguments_of
from gazepatch.training.bar import Bar
from gazepatch.training.chat import Collator
from gazepatch.training.checkpoints import Work
from gazepatch.training.order import Shuffled
from gazepatch.training.records import Records, lack_of_images, read_records
from gazepatch.training.schedule import Schedule
from gazepatch.training.settings import TrainConfig
from gazepatch.training.sharded import fsdp_wanted, shard
from gazepatch.training.trained import Trained
from gazepatch.training.trainer import GazeTrainer

#: Arguments of the Trainer that may be others when a training goes on: what it learns does not depend on them.
CHANGEABLE = frozenset(
    ("report_to", "run_name", "project", "logging_first_step", "dataloader_num_workers", "dataloader_pin_memory")
)


def train(
    source: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    config: GazeConfig | None = None,
    training: TrainConfig | None = None,
    trainer_arguments: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train a model to read few regions, and write the artefact of it.

    Interrupted, the same call goes on from the last checkpoint in the folder `out` + `.work`. Under `torchrun` or
    `accelerate launch` every process makes the same call.

    Args:
        source: Local folder or Hub id of a vision-language model. It is never written to.
        data: File of records, folder with one, or name of a set of `datasets`: see `gazepatch.training.records`.
        out: Folder to write; new, or empty.
        config: Settings of the gaze, by default `GazeConfig.paper()`; the final budget among them.
        training: Settings of the training, by default `TrainConfig()`.
        trainer_arguments: Further arguments of transformers' `TrainingArguments`: `report_to`, `bf16`, ...
        force: Replace `out` if it is an artefact already, once the new one is complete.
        progress: Whether to show a progress bar.
        **settings: Fields of `TrainConfig` to change in `training`.

    Returns:
        The folder, as an absolute path.

    Raises:
        ConfigError: A setting is wrong, or does not fit the others.
        TrainingError: The data are broken or without images, a package is missing, or `out` + `.work` holds another
            training, or one that is running.
        UnsupportedModelError: The architecture has no adapter, or no layer of it can gaze.
        ArtefactError: `source` is not a model with a processor, or lacks weights, or is an artefact already, or `out`
            cannot be written.
    """
    training = settings_of(training, TrainConfig()).changed(settings)
    config = settings_of(config, GazeConfig.paper())
    _check(config, training)
    refuse_artefact(source)
    model_config = base_config(source)
    adapter = adapter_for(model_config.model_type)
    gaze_layers(adapter, model_config, config)
    folder = Path(out).absolute()
    check_output(folder, Path(source).resolve() if Path(source).is_dir() else None, force)
    collator = Collator(open_processor(str(source)), adapter.inputs_of_answers)
    records = read_records(data, collator.rendered)  # a template that does not fit is found before the weights are read
    if lack := lack_of_images(records):
        raise TrainingError(lack)
    further = trainer_arguments or {}
    work = Work(folder, _identity(source, records, config, training, further))
    arguments = arguments_of(work.folder, training, len(records), further)
    spread = fsdp_wanted(arguments)
    with work.entered(arguments) as checkpoint:
        model, trained = _prepare(source, config, training)
        if training.trainable == "full" and training.objective == "distill":
            trained.teacher = _teacher(source, arguments, spread)
        schedule = Schedule.falling(config.budget, arguments.max_steps, training.schedule)
        trainer = GazeTrainer(
            objective=training.objective,
            trained=trained,
            schedule=schedule,
            order=Shuffled(len(records), arguments.max_steps * training.batch_size, training.seed),
            work=work,
            context_rate=training.context_peak_rate,
            model=model,
            args=arguments,
            train_dataset=records,
            data_collator=collator,
            callbacks=[Bar()] if progress else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.go_on(checkpoint)
        main = trainer.is_world_process_zero()
        state = trained.gathered(keep=main) if spread else {}
        if main:
            if spread:  # nobody else can be waited for from here on, and shards are nothing to be saved
                model, trained = _prepare(source, config, training)
                trained.take(state)
            trained.narrow()
            set_budget(model, config.budget)
            provenance = _provenance(trainer, records, training, schedule)
            full = training.trainable == "full"
            save(model, folder, full=full, processor=collator.processor, provenance=provenance, force=force)
            work.remove()
        trainer.accelerator.wait_for_everyone()
    return folder


def _check(config: GazeConfig, training: TrainConfig) -> None:
    if config.prefill != "gaze":
        raise ConfigError(
            "prefill must be 'gaze' in a training, where answers are read in one pass with their prompts, "
            f"got {config.prefill!r}"
        )
    if training.trainable == "context" and not config.context_tokens:
        raise ConfigError("context_tokens must be at least 1 when they are what is trained, got 0")
    if find_spec("accelerate") is None:
        raise TrainingError("training needs the package accelerate: pip install accelerate")
    if training.trainable == "lora":
        require_peft()


def _identity(
    source: str | Path, records: Records, config: GazeConfig, training: TrainConfig, further: Mapping[str, Any]
) -> dict[str, Any]:
    """What an interrupted training must agree on with the one that goes on."""
    how = {name: value for name, value in training.to_dict().items() if name not in ("save_every", "log_every")}
    how |= {f"trainer argument {name}": value for name, value in further.items() if name not in CHANGEABLE}
    what = {"model": _named(source), "data": _named(records.name), "data_digest": records.digest}
    return {**what, **config.to_dict(), **how}


def _named(source: str | Path) -> str:
    """A model or data, by one name for all spellings of a path."""
    path = Path(source)
    return str(path.resolve() if path.exists() else source)


def _prepare(source: str | Path, config: GazeConfig, training: TrainConfig) -> tuple[Any, Trained]:
    """The patched model, and what of it learns."""
    set_seed(training.seed)
    model = load_model(source)
    tokens = None
    if config.context_tokens:
        # Single precision, whatever the model's: small updates would vanish in fewer bits.
        tokens = nn.Parameter(initial_context_tokens(model, config.context_tokens, seed=training.seed))
    apply(model, config, context_tokens=tokens)
    return model, Trained(model, training.trainable, lora_rank=training.lora_rank)


def _teacher(source: str | Path, arguments: TrainingArguments, spread: bool) -> nn.Module:
    """A copy of the model as it was, spread over the processes if the model is."""
    teacher: nn.Module = load_model(source).requires_grad_(False).eval()
    if not spread:
        return teacher.to(arguments.device)
    layers: Any = adapter_for(teacher.config.model_type).decoder(teacher).layers  # type: ignore[union-attr, arg-type]
    shard(teacher, layers)
    return teacher


def _provenance(trainer: GazeTrainer, records: Records, training: TrainConfig, schedule: Schedule) -> dict[str, Any]:
    """How the artefact came about, for its `gaze_config.json`."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    return {
        **training.to_dict(),
        "learning_rate": training.peak_rate,
        "context_learning_rate": training.context_peak_rate,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.global_step * training.batch_size / len(records),
        "budgets": [list(stage) for stage in schedule.stages],
        "data": records.name if not Path(records.name).is_absolute() else Path(records.name).name,
        "data_digest": records.digest,
        "records": len(records),
        "processes": trainer.accelerator.num_processes,
        "final_loss": last.get("loss"),
        "final_agreement_in_training": last.get("agreement"),
        "versions": {
            "gazepatch": version("gazepatch"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    }
