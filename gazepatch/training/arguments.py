"""transformers' `TrainingArguments` for a training: what its settings decide, what may be given, and what may not."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from gazepatch.errors import ConfigError
from gazepatch.training.settings import TrainConfig

WARM_UP = 0.03  # share of the steps over which the learning rate rises
#: Arguments of the Trainer that would do nothing here: batches, their order, passes and losses are made otherwise.
DECIDED = frozenset(
    (
        "per_device_train_batch_size",
        "auto_find_batch_size",
        "num_train_epochs",
        "dataloader_drop_last",
        "group_by_length",
        "train_sampling_strategy",
        "label_smoothing_factor",
    )
)


def arguments_of(folder: Path, training: TrainConfig, records: int, further: Mapping[str, Any]) -> TrainingArguments:
    """transformers' arguments for a training on so many records, whose checkpoints go to `folder`.

    Args:
        folder: Of the checkpoints.
        training: Settings of the training.
        records: How many there are.
        further: Arguments that were given for the Trainer.

    Raises:
        ConfigError: One of these is unknown, wrong, or decided by the settings.
    """
    steps = training.steps_for(records)
    ours: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "gradient_accumulation_steps": training.accumulate,
        "learning_rate": training.peak_rate,
        "seed": training.seed,
        "data_seed": training.seed,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": None,  # `Work` removes old ones, but not before the new one is whole
        "logging_strategy": "steps",
        "logging_steps": min(training.log_every, steps),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,  # for a bar of our own
    }
    free = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(WARM_UP * steps),
        "weight_decay": 0.0,
        "report_to": "none",
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.accelerator.is_available(),  # or several processes would not find each other
    }
    _refuse(further, ours.keys() | DECIDED)
    try:
        arguments = TrainingArguments(**{**ours, **free, **further})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses the trainer's arguments: {' '.join(str(error).split())}") from error
    arguments.per_device_train_batch_size = training.per_device(arguments.world_size)
    if arguments.n_gpu > 1:  # one process would copy the patched model to every GPU, which its patch cannot follow
        arguments._n_gpu = 1
    return arguments


def _refuse(further: Mapping[str, Any], decided: Set[str]) -> None:
    if taken := sorted(decided & further.keys()):
        raise ConfigError(f"{', '.join(taken)} cannot be among the trainer's arguments: training settings decide them")
    if further.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "deepspeed cannot train here, nobody has tried it: fsdp=true spreads a model over processes as ZeRO-3 "
            "does, and torchrun without either gives each process the whole model and a part of the batch"
        )
