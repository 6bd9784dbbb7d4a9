"""What a training minimises, on the logits `[N, V]` that choose the assistant's N tokens: sums over them, not means."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distill(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's next-token distributions from the teacher's, in nats."""
    log_student, log_teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="sum")


def next_token(student: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of the right `tokens` `[N]`, in nats."""
    return F.cross_entropy(student.float(), tokens, reduction="sum")


def agreed(student: Tensor, teacher: Tensor) -> Tensor:
    """How many of the most likely tokens are the teacher's."""
    return (student.argmax(-1) == teacher.argmax(-1)).sum()
