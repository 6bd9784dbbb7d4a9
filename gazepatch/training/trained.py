"""What a training changes: which parameters those are, how they are kept in a checkpoint, and what they are held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gazepatch.errors import TrainingError
from gazepatch.lora import add_lora, without_lora
from gazepatch.patch import context_tokens_of, dense, patch_of, root_model

FILE_NAME = "trained.safetensors"


class Trained:
    """The parameters of a patched model that learn: all others are frozen when this is made.

    Args:
        model: The patched model.
        trainable: `context`, `lora` or `full`.
        lora_rank: Rank of the adapters.
        teacher: For `full`, an unpatched copy of the model as it was, or None when nothing is held to it.
    """

    def __init__(self, model: Any, trainable: str, *, lora_rank: int, teacher: nn.Module | None = None) -> None:
        self.model, self.trainable, self.teacher = model, trainable, teacher
        model.requires_grad_(trainable == "full")
        if trainable == "lora":
            add_lora(model, patch_of(model).runtime.adapter.decoder(model), lora_rank)
        if (tokens := context_tokens_of(model)) is not None:
            tokens.requires_grad_(True)
        self.names = [name for name, held in model.named_parameters() if held.requires_grad]

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write these parameters, and nothing else, into a checkpoint; `state` gathers them where they are sharded."""
        held = dict(self.model.named_parameters()) if state is None else state
        save_file({name: held[name].detach().cpu().contiguous() for name in self.names}, folder / FILE_NAME)

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Take them from a checkpoint.

        Raises:
            TrainingError: It holds others.
        """
        found, held = load_file(folder / FILE_NAME), dict(self.model.named_parameters())
        if found.keys() != set(self.names) or any(found[n].shape != held[n].shape for n in self.names):
            raise TrainingError(f"{folder} is of another training: remove its folder to begin anew")
        for name in self.names:
            held[name].copy_(found[name])

    @contextmanager
    def untrained(self, wrapped: nn.Module) -> Iterator[nn.Module]:
        """The model as it was, read densely: what `distill` holds the training to.

        Args:
            wrapped: The model in whatever the processes share it by.
        """
        if self.teacher is not None:
            yield self.teacher
            return
        training = wrapped.training
        wrapped.eval()
        try:
            with dense(wrapped), without_lora(root_model(wrapped)) if self.trainable == "lora" else nullcontext():
                yield wrapped
        finally:
            wrapped.train(training)
