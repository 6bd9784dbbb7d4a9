"""Which answers are right, by task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from data import IGNORED, Batch
from torch import Tensor
from words import GROUPS


def right_tokens(batch: Batch, logits: Tensor) -> Tensor:
    """`[B, T]` whether the most likely word is the right one; True where nothing is to be answered.

    Args:
        batch: The sequences.
        logits: `[B, T + 1, V]` at the last position before the text and at all of the text.
    """
    return (logits[:, :-1].argmax(-1) == batch.labels) | (batch.labels == IGNORED)


def score(batches: Sequence[Batch], right: Sequence[Tensor]) -> dict[str, float]:
    """Shares of questions answered exactly, by task and group.

    An answer counts when all its words are the most likely ones given the right words before them, which is when
    greedy decoding writes exactly this answer. `T2 cells` is the share of right words in the answers of T2, `T5` what
    the questions after the first of a sequence about one board reach.

    Args:
        batches: What was asked.
        right: `right_tokens` of each.
    """
    found: dict[str, list[float]] = defaultdict(list)
    groups = {task: group for group, tasks in GROUPS.items() for task in tasks}
    for batch, correct in zip(batches, right, strict=True):
        for questions, turns, oks in zip(batch.questions, batch.turn.tolist(), correct.tolist(), strict=True):
            answers: dict[int, list[bool]] = defaultdict(list)
            for turn, ok in zip(turns, oks, strict=True):
                answers[turn].append(ok)
            for i, question in enumerate(questions):
                exact = float(all(answers[i]))
                found[question.task].append(exact)
                found[groups[question.task]].append(exact)
                if groups[question.task] == "T2":
                    found["T2 cells"] += map(float, answers[i][:-1])
                if i and question.task != "frame":
                    found["T5"].append(exact)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}
