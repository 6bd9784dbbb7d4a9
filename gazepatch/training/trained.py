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
from gazepatch.training.precision import narrow, widen
from gazepatch.training.sharded import assign, is_shard, layer_classes, whole

FILE_NAME = "trained.safetensors"


class Trained:
    """The parameters of a patched model that learn: all others are frozen when this is made.

    Args:
        model: The patched model.
        trainable: `context`, `lora` or `full`.
        lora_rank: Rank of the adapters.

    Attributes:
        teacher: For `full`, an unpatched copy of the model as it was, or None when nothing is held to it.
    """

    def __init__(self, model: Any, trainable: str, *, lora_rank: int) -> None:
        self.model, self.trainable = model, trainable
        self.teacher: nn.Module | None = None
        self._decoder = patch_of(model).runtime.adapter.decoder(model)
        model.requires_grad_(trainable == "full")
        self._dtypes = widen(model) if trainable == "full" else {}
        if trainable == "lora":
            add_lora(model, self._decoder, lora_rank)
        if (tokens := context_tokens_of(model)) is not None:
            tokens.requires_grad_(True)
        self.names = [name for name, held in model.named_parameters() if held.requires_grad]
        self._still = [*_still(model, self._decoder)]

    def gathered(self, keep: bool = True) -> dict[str, Tensor]:
        """These parameters, whole, on the CPU, one after the other; every process must call it, and may keep none."""
        held, found = dict(self.model.named_parameters()), {}
        for name in self.names:
            tensor = whole(held[name])
            if keep:
                found[name] = tensor.cpu().contiguous()
        return found

    def take(self, found: Mapping[str, Tensor]) -> None:
        """The inverse of `gathered`; every process gives the same."""
        held = dict(self.model.named_parameters())
        for name in self.names:
            assign(held[name], found[name])

    def narrow(self) -> None:
        """Give the weights the types that they were loaded in: they learn in single precision."""
        narrow(self.model, self._dtypes)

    def write(self, folder: Path, writes: bool = True) -> None:
        """Write these parameters, and nothing else, into a checkpoint; every process must call it, and one writes."""
        found = self.gathered(keep=writes)
        if writes:
            save_file(found, folder / FILE_NAME)

    def read(self, folder: Path) -> None:
        """Take them from a checkpoint.

        Raises:
            TrainingError: It holds others.
        """
        found, held = load_file(folder / FILE_NAME), dict(self.model.named_parameters())
        if found.keys() != set(self.names) or any(found[n].shape != held[n].shape for n in self.names):
            raise TrainingError(f"{folder} is of another training: remove its folder to begin anew")
        self.take(found)

    def layer_classes(self) -> list[str]:
        """`sharded.layer_classes` of the model."""
        return layer_classes(self._decoder)

    def reach_all(self) -> None:
        """Let every pass reach all of these parameters, with a gradient of nothing if need be.

        Processes wait for each other's gradients, and without an image context tokens have none. Layers that are
        spread over processes have given theirs away when the pass ends; they always have some.
        """

        def reach(module: nn.Module, args: Any, output: Any) -> Any:
            if torch.is_grad_enabled():
                here = [p for p in module.parameters() if p.requires_grad and not is_shard(p)]
                output.logits = output.logits + 0.0 * sum(p.sum() for p in here)
            return output

        self.model.register_forward_hook(reach)
        if self.trainable == "lora":
            self._decoder.register_forward_pre_hook(_want_gradients, with_kwargs=True)

    def learn(self, wrapped: nn.Module) -> None:
        """Put the model, in whatever processes share it by, into training mode, but for what has to stay as it is.

        That is what does not learn: dropout would make other features of the same image, and running statistics would
        move, which no artefact holds. Frozen layers of the decoder are an exception, as they keep no activations for
        the gradients of context tokens only in training mode (`gradient_checkpointing`).
        """
        wrapped.train()
        for module in self._still:
            module.eval()

    @property
    def knows_untrained(self) -> bool:
        """Whether there is an `untrained` model: where all weights learn, only a teacher is one."""
        return self.trainable != "full" or self.teacher is not None

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
            # Adapters that the model came with are part of it.
            with dense(wrapped), without_lora(root_model(wrapped)) if self.trainable == "lora" else nullcontext():
                yield wrapped
        finally:
            wrapped.train(training)


def _want_gradients(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Have the decoder's input want gradients, with an image or without.

    FSDP2 hands in those of a layer when they are passed on to its input. Without any, those of the first layer come
    last, while a process whose records have images hands in the same where they belong.
    """
    embeds = kwargs.get("inputs_embeds")
    if torch.is_grad_enabled() and embeds is not None and not embeds.requires_grad:
        embeds.requires_grad_()


def _still(module: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module, the decoder left out, that learn nothing; and norms with running statistics."""
    if module is decoder:
        return
    learns = any(parameter.requires_grad for parameter in module.parameters())
    if not learns or getattr(module, "track_running_stats", False):
        yield module
        return
    for child in module.children():
        yield from _still(child, decoder)
