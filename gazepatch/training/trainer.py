"""transformers' `Trainer` with the objectives of gaze: its loop, processes, optimisers and logs stay as they are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from gazepatch.errors import TrainingError
from gazepatch.files import given_room
from gazepatch.patch import context_tokens_of, patch_of, root_model, set_budget
from gazepatch.training.chat import supervised
from gazepatch.training.checkpoints import Work
from gazepatch.training.objectives import agreed, distill, next_token
from gazepatch.training.order import Shuffled
from gazepatch.training.schedule import Schedule
from gazepatch.training.trained import Trained


class GazeTrainer(Trainer):
    """Trains a patched model.

    Args:
        objective: `distill` or `next-token`.
        trained: The parameters that learn.
        schedule: Budgets by step.
        order: Of the records.
        work: Where checkpoints go.
        context_rate: Peak of the learning rate of the context tokens; that of all else is the Trainer's.
        **trainer: As for `Trainer`; its model is the patched one.
    """

    def __init__(
        self,
        *,
        objective: str,
        trained: Trained,
        schedule: Schedule,
        order: Shuffled,
        work: Work,
        context_rate: float,
        **trainer: Any,
    ) -> None:
        super().__init__(**trainer)
        self.objective: str = objective
        self.trained, self.order, self.work, self.context_rate = trained, order, work, context_rate
        # The loss is a mean over the tokens of the whole update, of all processes and parts: see compute_loss.
        self.model_accepts_loss_kwargs = True
        self.counts = torch.zeros(2, device=self.args.device)  # tokens on which gaze and dense agree, of how many
        self.add_callback(Lowering(schedule, trainer["model"]))
        trained.reach_all()
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or trained.layer_classes()

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the context tokens in a group of their own."""
        made: torch.optim.Optimizer = super().create_optimizer(*(() if model is None else (model,)))
        tokens = context_tokens_of(self.trained.model)
        for group in list(made.param_groups):
            if any(parameter is tokens for parameter in group["params"]):
                group["params"] = [parameter for parameter in group["params"] if parameter is not tokens]
                made.add_param_group({**group, "params": [tokens], "lr": self.context_rate})
        return made

    def go_on(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; a checkpoint of the last step is taken as it is."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= int(self.args.max_steps):  # killed before the artefact was written
                self.state = state
                return self.trained.read(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's mean over the assistant's tokens of the update; this process's share of it."""
        labels = inputs["labels"]
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        columns, kept, tokens = supervised(labels)
        teacher = None
        if self.objective == "distill" or (self._logs_next() and self.trained.knows_untrained):
            with torch.no_grad(), self.trained.untrained(model) as untrained:
                teacher = logits_at(untrained, inputs, columns, kept)
        if model.training:
            self.trained.learn(model)
        student = logits_at(model, inputs, columns, kept)
        if teacher is not None:
            self.counts += torch.stack([agreed(student, teacher), torch.tensor(len(tokens)).to(student.device)])
        total = distill(student, teacher) if self.objective == "distill" else next_token(student, tokens)  # type: ignore[arg-type]
        count = torch.as_tensor(len(tokens) if num_items_in_batch is None else num_items_in_batch)
        loss = total / count.clamp(min=1)  # records without answers teach nothing
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, {"logits": student}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add budget and agreement to what the Trainer logs.

        Raises:
            TrainingError: The loss is not finite any more.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rate"
                )
            right, of = self.accelerator.reduce(self.counts, "sum").tolist()
            self.counts = torch.zeros_like(self.counts)
            logs["budget"] = patch_of(self.trained.model).config.budget
            if of:  # a model that learns as a whole to predict the data is compared with nothing
                logs["agreement"] = right / of
        super().log(logs, start_time)

    def _logs_next(self) -> bool:
        return (self.state.global_step + 1) % int(self.args.logging_steps) == 0

    # ---- checkpoints: what is trained, and what the Trainer needs to go on

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained; every process must call it."""
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
        self.trained.write(folder, bool(self.args.should_save))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        from accelerate.utils import save_fsdp_optimizer  # type: ignore[import-untyped,unused-ignore]

        # The Trainer would write all of the model beside it.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.trained.read(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        then = "make room: the same command then goes on from the last checkpoint, if there is one"
        with given_room(self.work.folder, then):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.work.complete(self.state.global_step)


class Lowering(TrainerCallback):
    """Gives every step the budget of the schedule."""

    def __init__(self, schedule: Schedule, model: nn.Module) -> None:
        self.schedule, self.model = schedule, model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_budget(self.model, self.schedule.budget(state.global_step))


def logits_at(model: nn.Module, inputs: Mapping[str, Any], columns: Tensor, kept: Tensor) -> Tensor:
    """`[N, V]` at the positions that `supervised` found: all of them would be a training's largest tensor by far.

    Args:
        model: Patched or not.
        inputs: The model's, without labels.
        columns: `[C]`.
        kept: `[B, C]`.
    """
    root: Any = root_model(model)
    dtype = root.get_input_embeddings().weight.dtype  # which the model's own pixels may not have
    inputs = {name: x.to(dtype) if _is_pixels(name, x) else x for name, x in inputs.items()}
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # some families take no `logits_to_keep`, and say nothing
        logits = logits[:, columns]
    return logits[kept]


def _is_pixels(name: str, value: Any) -> bool:
    """By the names that processors give them: other numbers, such as seconds of frames, keep their precision."""
    named = "pixel_values" in name or "patches" in name
    return named and torch.is_tensor(value) and value.is_floating_point()
