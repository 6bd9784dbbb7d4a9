"""How closely gaze follows dense on conversations about images, and how often each says the right token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gazepatch.errors import ConfigError
from gazepatch.inspection import locate, read_whole
from gazepatch.lora import without_lora
from gazepatch.patch import (
    context_tokens_of,
    dense,
    patch_of,
    patched,
    prompt_reads,
    restored,
    root_model,
    set_budget,
)
from gazepatch.registry import adapter_for
from gazepatch.training.chat import Collator, supervised
from gazepatch.training.objectives import agreed, distill
from gazepatch.training.records import Records, read_records
from gazepatch.training.trainer import logits_at
from gazepatch.verification import check_finite


@dataclass(frozen=True)
class Score:
    """What one budget costs, over all tokens of the assistant.

    Attributes:
        budget: Share or number of the regions that are read.
        read_share: Share of the visual entries, in the layers that gaze, that the queries read which choose these
            tokens. It is counted, not taken from the budget, and the mean over conversations with images, weighted by
            their tokens: 1.0 of one that is read whole. None where no answer has an image before it.
        agreement: Share of tokens for which gaze and dense hold the same one most likely.
        divergence: Mean of `KL(dense || gaze)`, in nats.
        accuracy: Share of tokens that gaze holds most likely and that stand in the data.
        dense_accuracy: The same of dense.
        tokens: How many there were.
        read_whole: Conversations in which nothing gazed: they have fewer visual tokens than `min_visual_tokens`.
    """

    budget: float | int
    read_share: float | None
    agreement: float
    divergence: float
    accuracy: float
    dense_accuracy: float
    tokens: int
    read_whole: int


def evaluate(
    model: nn.Module,
    processor: Any,
    data: str | Path | Records,
    *,
    budgets: Sequence[float | int] | float | int = (),
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Compare a patched model with itself read densely, token by token along the answers of some conversations.

    Each conversation is read in one pass, as in a training: what the user says after an image gazes too, whatever
    `prefill` is set to. What is read is counted for the assistant's tokens alone: these read as much as decode steps.
    The dense side has neither routing nor context tokens nor LoRA adapters.

    Args:
        model: The patched model; it is left as it was. Caches that it has filled cannot be used any more.
        processor: The model's.
        data: File of records, folder with one, or name of a set of `datasets`: see `gazepatch.training.records`; or
            what `read_records` there has made of one.
        budgets: Budgets to measure, one or several; by default the model's own.
        limit: Read so many conversations only.
        progress: Called with the conversations done and those there are.

    Returns:
        A score for every budget, in the order given.

    Raises:
        PatchError: The model is not patched.
        ConfigError: A budget is not one, `limit` is not positive, or the model's logits are not finite.
        TrainingError: The data are broken.
    """
    config, tokens = patch_of(model).config, context_tokens_of(model)
    wanted = (budgets,) if isinstance(budgets, (int, float)) else budgets
    gazes = [replace(config, prefill="gaze", budget=budget) for budget in wanted or (config.budget,)]
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    collator = Collator(processor, adapter_for(root_model(model).config.model_type).inputs_of_answers)
    records = data if isinstance(data, Records) else read_records(data)
    count = min(len(records), limit or len(records))
    sums, whole = [_Sums(gaze.budget) for gaze in gazes], 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with restored(model), patched(model, gazes[0], context_tokens=tokens):
            for number in range(count):
                inputs = collator([records[number]])
                few = _whole(model, inputs, config.min_visual_tokens)
                _follow(model, inputs, few, sums)
                whole += few
                if progress is not None:
                    progress(number + 1, count)
    finally:
        for module, training in modes.items():
            module.training = training
    return [of_budget.score(whole) for of_budget in sums]


@dataclass
class _Sums:
    """Sums over the assistant's tokens so far, for one budget: `read` of shares, over those `with_images`."""

    budget: float | int
    tokens: int = 0
    with_images: int = 0
    read: float = 0.0
    agreed: float = 0.0
    divergence: float = 0.0
    accuracy: float = 0.0
    dense_accuracy: float = 0.0

    def add(self, gazed: Tensor, densely: Tensor, answer: Tensor, read: float | None) -> None:
        """The logits `[N, V]` of both for an answer `[N]`, and the share that gaze read for it; None: of no image."""
        check_finite(densely, gazed)
        self.tokens += len(answer)
        if read is not None:
            self.with_images += len(answer)
            self.read += read * len(answer)
        self.agreed += float(agreed(gazed, densely))
        self.divergence += max(0.0, float(distill(gazed, densely)))  # which rounding may bring below
        self.accuracy += float((gazed.argmax(-1) == answer).sum())
        self.dense_accuracy += float((densely.argmax(-1) == answer).sum())

    def score(self, whole: int) -> Score:
        """Means of these, with how many conversations were read `whole`."""
        count = max(1, self.tokens)
        return Score(
            budget=self.budget,
            read_share=self.read / self.with_images if self.with_images else None,
            agreement=self.agreed / count,
            divergence=self.divergence / count,
            accuracy=self.accuracy / count,
            dense_accuracy=self.dense_accuracy / count,
            tokens=self.tokens,
            read_whole=whole,
        )


@torch.no_grad()
def _follow(model: Any, batch: Mapping[str, Any], whole: bool, sums: Sequence[_Sums]) -> None:
    """Add one conversation, of which nothing gazes if it is read `whole`, to the sums of every budget."""
    root = root_model(model)
    inputs = {name: x.to(root.device) if torch.is_tensor(x) else x for name, x in batch.items()}
    labels = inputs.pop("labels")
    columns, kept, answer = supervised(labels)
    choosing = torch.zeros_like(labels, dtype=torch.bool).index_copy(1, columns, kept)
    with dense(model), without_lora(root):
        densely = logits_at(model, inputs, columns, kept)
    for of_budget in sums:
        set_budget(model, of_budget.budget)
        with prompt_reads(model, choosing) as reads:
            gazed = logits_at(model, inputs, columns, kept)
        of_budget.add(gazed, densely, answer, 1.0 if whole and reads.share is None else reads.share)


def _whole(model: Any, batch: Mapping[str, Any], minimum: int) -> bool:
    """Whether a conversation has images, and too few visual tokens to gaze."""
    root = root_model(model)
    return bool(read_whole(locate(adapter_for(root.config.model_type), root, batch), minimum))
