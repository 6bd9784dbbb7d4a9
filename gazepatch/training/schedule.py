"""The progressive schedule: which budget a step of the training reads with.

Early on, queries and descriptors are barely related, and a small budget from the first step on costs quality: the
paper starts dense and lowers the number of regions step by step (https://arxiv.org/abs/2605.13080).
"""

from __future__ import annotations

from dataclasses import dataclass

Budget = float | int

#: Dense first, then these multiples of the final budget, one after the other.
MULTIPLES = (8, 4, 2)


@dataclass(frozen=True)
class Schedule:
    """Budgets by step.

    Attributes:
        stages: First step and budget of every stage, in order; the first one begins at step 0.
    """

    stages: tuple[tuple[int, Budget], ...]

    @classmethod
    def falling(cls, final: Budget, steps: int, share: float) -> Schedule:
        """From dense to `final` over the first `share` of `steps`, in stages of equal length; a share of 0: no fall."""
        larger = [final * times for times in MULTIPLES]
        # A float of 1 or more is no share of the regions, but dense; numbers of regions have no such limit.
        before: list[Budget] = [1.0, *(budget for budget in larger if isinstance(final, int) or budget < 1)]
        if final == 1.0 and isinstance(final, float):
            before = []
        stages: dict[int, Budget] = {}
        for number, budget in enumerate([*before, final]):
            stages[int(steps * share * number / max(1, len(before)))] = budget  # stages of no length give way
        return cls(tuple(sorted(stages.items())))

    def budget(self, step: int) -> Budget:
        """The budget of a step, counted from 0."""
        return [budget for first, budget in self.stages if first <= step][-1]
