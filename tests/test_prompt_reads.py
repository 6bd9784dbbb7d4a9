"""What queries of a prompt read, as `prompt_reads` counts it: what decode steps read, as `stats` counts that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from crossing import CASES
from tiny import Case, batch, built

from gazepatch.config import GazeConfig
from gazepatch.context import initial_context_tokens
from gazepatch.counters import PromptReads, Stats
from gazepatch.errors import PatchError
from gazepatch.patch import patched, prompt_reads, stats
from gazepatch.verification import _uncached, generate_logits

QUARTER = GazeConfig(
    region=(3, 3, 2), window=(3, 1, 1), budget=0.25, periphery=False, min_visual_tokens=0, prefill="gaze"
)
STEPS = 3


@torch.no_grad()
def counted(case: Case, config: GazeConfig, context_tokens: int = 0) -> tuple[PromptReads, Stats]:
    """Of the same tokens of an answer, as the end of a prompt and as decode steps."""
    context = initial_context_tokens(case.model, context_tokens) if context_tokens else None
    ids = case.inputs["input_ids"]
    answer = torch.zeros(len(ids), ids.shape[1] + STEPS, dtype=torch.bool)
    answer[:, -STEPS:] = True
    with patched(case.model, config, context_tokens=context):
        _, tokens = generate_logits(case.model, case.inputs, STEPS)
        steps = stats(case.model)
        with prompt_reads(case.model, answer) as reads:
            _uncached(case.model, case.inputs, tokens)
        _uncached(case.model, case.inputs, tokens)  # after the block nothing is counted
    return reads, steps


@pytest.mark.parametrize("settings", [{}, {"budget": 2, "head_reduce": "none"}, {"budget": 1.0}], ids=str)
@pytest.mark.parametrize("context_tokens", [0, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "kimi_k25"])
def test_a_batch(name: str, context_tokens: int, settings: dict[str, object]) -> None:
    reads, steps = counted(batch(built(name)), replace(QUARTER, **settings), context_tokens)
    assert (reads.visual, reads.read) == (steps.visual_entries, steps.read_entries)
    assert reads.share == steps.read_share and (steps.read_share < 0.6 or settings == {"budget": 1.0})


@pytest.mark.parametrize("name", CASES)
def test_images_outside_of_the_sequence(name: str) -> None:
    reads, steps = counted(CASES[name](), QUARTER)
    assert (reads.visual, reads.read) == (steps.visual_entries, steps.read_entries) and reads.share == 0.25
    reads, steps = counted(CASES[name](), replace(QUARTER, min_visual_tokens=10**6))
    assert (reads.visual, reads.read) == (steps.visual_entries, steps.read_entries) and reads.share == 1.0


def test_where_nothing_gazes_nothing_is_counted() -> None:
    case = built("llava")
    assert counted(case, replace(QUARTER, min_visual_tokens=10**6))[0].share is None
    assert counted(case, replace(QUARTER, prefill="dense"))[0].share is None
    with pytest.raises(PatchError), prompt_reads(case.model, torch.ones(1, 1, dtype=torch.bool)):
        pass


@torch.no_grad()
def test_images_themselves_and_text_before_them_do_not_count() -> None:
    case = built("llava")
    ids = case.inputs["input_ids"]
    first = min(span.stop for span in case.spans)
    with patched(case.model, QUARTER), prompt_reads(case.model, torch.arange(ids.shape[1])[None] < first) as reads:
        case.model(**case.inputs)
    assert reads.share is None
