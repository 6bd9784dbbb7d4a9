"""How closely gaze follows dense on conversations about images, and how often each says the right token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gazepatch.errors import ConfigError
from gazepatch.inspection import locate, read_whole
from gazepatch.lora import has_lora, without_lora
from gazepatch.patch import context_tokens_of, dense, patch_of, patched, restored, root_model, set_budget
from gazepatch.registry import adapter_for
from gazepatch.training.chat import Collator, supervised
from gazepatch.training.objectives import agreed, distill
from gazepatch.training.records import read_records
from gazepatch.training.trainer import logits_at


@dataclass(frozen=True)
class Score:
    """What one budget costs, over all tokens of the assistant.

    Attributes:
        budget: Share or number of the regions that are read.
        agreement: Share of tokens for which gaze and dense hold the same one most likely.
        divergence: Mean of `KL(dense || gaze)`, in nats.
        right: Share of tokens that gaze holds most likely and that stand in the data.
        dense_right: The same of dense.
        tokens: How many there were.
        whole: Conversations in which nothing gazed, because they have fewer visual tokens than `min_visual_tokens`.
    """

    budget: float | int
    agreement: float
    divergence: float
    right: float
    dense_right: float
    tokens: int
    whole: int


def evaluate(
    model: nn.Module,
    processor: Any,
    data: str | Path,
    *,
    budgets: Sequence[float | int] = (),
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Compare a patched model with itself read densely, token by token along the answers of some conversations.

    Each conversation is read in one pass, as in a training: what the user says behind an image gazes too, whatever
    `prefill` is set to. The dense side has neither routing nor context tokens nor LoRA adapters.

    Args:
        model: The patched model; it is left as it was.
        processor: The model's.
        data: File of records, folder with one, or name of a set of `datasets`: see `gazepatch.training.records`.
        budgets: Budgets to measure, by default the model's own.
        limit: Read so many conversations only.
        progress: Called with the conversations done and those there are.

    Returns:
        A score for every budget, in the order given.

    Raises:
        PatchError: The model is not patched.
        ConfigError: A budget is not one, or `limit` is not positive.
        TrainingError: The data are broken.
    """
    config, tokens = patch_of(model).config, context_tokens_of(model)
    gazes = [replace(config, prefill="gaze", budget=budget) for budget in budgets or (config.budget,)]
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    collator, records = Collator(processor), read_records(data)
    count = min(len(records), limit or len(records))
    sums = torch.zeros(len(gazes), 4, dtype=torch.float64)
    total = whole = 0
    training = model.training
    model.eval()
    try:
        with restored(model), patched(model, gazes[0], context_tokens=tokens):
            for number in range(count):
                inputs = collator([records[number]])
                found, seen = _follow(model, inputs, [gaze.budget for gaze in gazes])
                sums, total, whole = sums + found, total + seen, whole + _whole(model, inputs, config.min_visual_tokens)
                if progress is not None:
                    progress(number + 1, count)
    finally:
        model.train(training)
    shares = (sums / max(1, total)).tolist()
    return [
        Score(gaze.budget, agreement, divergence, right, dense_right, total, whole)
        for gaze, (agreement, divergence, right, dense_right) in zip(gazes, shares, strict=True)
    ]


@torch.no_grad()
def _follow(model: Any, batch: Mapping[str, Any], budgets: Sequence[float | int]) -> tuple[torch.Tensor, int]:
    """Sums `[budgets, 4]` over the assistant's tokens of one conversation, and how many those are."""
    root = root_model(model)
    inputs = {name: value.to(root.device) for name, value in batch.items()}
    columns, kept, answer = supervised(inputs.pop("labels"))
    with dense(model), without_lora(root) if has_lora(root) else nullcontext():
        whole = logits_at(model, inputs, columns, kept)
    rows = []
    for budget in budgets:
        set_budget(model, budget)
        gazed = logits_at(model, inputs, columns, kept)
        right, dense_right = ((logits.argmax(-1) == answer).sum() for logits in (gazed, whole))
        rows.append(torch.stack([agreed(gazed, whole), distill(gazed, whole), right, dense_right]))
    return torch.stack(rows).double().cpu(), len(answer)


def _whole(model: Any, batch: Mapping[str, Any], least: int) -> bool:
    """Whether a conversation has images, and too few visual tokens to gaze."""
    root = root_model(model)
    return bool(read_whole(locate(adapter_for(root.config.model_type), root, batch), least))
