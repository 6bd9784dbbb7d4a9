"""`TrainConfig`: every setting of a training but those of the gaze, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gazepatch.config import GazeConfig, check_choice, check_int
from gazepatch.errors import ConfigError

OBJECTIVES = ("distill", "next-token")
TRAINABLE = ("context", "lora", "full")

#: Peaks of the learning rate.
RATES = {"context": 3e-3, "lora": 2e-4, "full": 1e-5}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Args:
        objective: `distill`: answer like the same model read densely, which needs no right answers; `next-token`:
            predict the answers of the data.
        trainable: What learns: the `context` tokens alone, `lora` adapters of the text decoder and the context tokens,
            or the `full` model and the context tokens.
        epochs: Passes over the data, unless `steps` is given.
        steps: Number of updates; None: as many as `epochs` gives.
        batch_size: Records of one update, over all processes.
        accumulate: Gradient accumulation steps: in how many parts a process computes its records of one update.
        learning_rate: Peak of the learning rate; None: 0.003 for context, 0.0002 for lora, 0.00001 for full.
        context_learning_rate: That of the context tokens beside lora or full; None: 0.003. They are few and start far
            from where they are wanted; weights are many and must not move far.
        schedule: Share of the steps over which the budget falls, from dense by way of 8, 4 and 2 times the final one.
        lora_rank: Rank of the LoRA adapters.
        seed: Seed for the initial context tokens and the order of the records.
        save_every: Steps between checkpoints, from which an interrupted training goes on.
        log_every: Log loss and agreement every so many steps.

    Raises:
        ConfigError: A setting has the wrong type or value.
    """

    objective: str = "distill"
    trainable: str = "context"
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    context_learning_rate: float | None = None
    schedule: float = 0.5
    lora_rank: int = 16
    seed: int = 0
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("trainable", self.trainable, TRAINABLE)
        for name in ("batch_size", "accumulate", "lora_rank", "save_every", "log_every"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("seed", self.seed, minimum=0)
        if self.steps is not None:
            check_int("steps", self.steps, minimum=1)
        _check_number("epochs", self.epochs, "above 0", _positive)
        for name in ("learning_rate", "context_learning_rate"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), "above 0", _positive)
        if self.trainable == "context" and self.context_learning_rate is not None:
            raise ConfigError("context_learning_rate is for lora and full: with context alone, give learning_rate")
        _check_number("schedule", self.schedule, "from 0 to 1", lambda share: 0 <= share <= 1)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}"
            )

    @property
    def peak_rate(self) -> float:
        """The learning rate in use."""
        return RATES[self.trainable] if self.learning_rate is None else self.learning_rate

    @property
    def context_peak_rate(self) -> float:
        """The learning rate of the context tokens in use."""
        if self.trainable == "context":
            return self.peak_rate
        return RATES["context"] if self.context_learning_rate is None else self.context_learning_rate

    def steps_for(self, records: int) -> int:
        """Updates of a training on so many records."""
        return self.steps or max(1, math.ceil(self.epochs * math.ceil(records / self.batch_size)))

    def per_device(self, processes: int) -> int:
        """Records that one process computes at a time.

        Raises:
            ConfigError: The batch cannot be shared out evenly.
        """
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size must be a multiple of processes x accumulate = {processes} x {self.accumulate}, "
                f"got {self.batch_size}"
            )
        return self.batch_size // parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return dataclasses.asdict(self)

    def changed(self, settings: Mapping[str, Any]) -> TrainConfig:
        """These settings with others in the place of some.

        Raises:
            ConfigError: One of them is unknown, or a setting of the gaze.
        """
        if of_gaze := sorted(settings.keys() & {field.name for field in dataclasses.fields(GazeConfig)}):
            raise ConfigError(
                f"{', '.join(of_gaze)} cannot be among the settings of a training: they are of the gaze, so give "
                "config=GazeConfig.paper(...) with them"
            )
        return self.from_dict({**self.to_dict(), **settings})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Missing keys take their defaults, unknown keys are an error."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, settings.keys() - set(known))):
            raise ConfigError(f"unknown training setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**settings)


def _positive(value: float) -> bool:
    return value > 0


def _check_number(name: str, value: object, wanted: str, within: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not within(value):
        raise ConfigError(f"{name} must be a number {wanted}, got {value!r}")
