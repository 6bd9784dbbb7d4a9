"""One line that says how far a training is: loss, budget, and agreement with dense."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazepatch.config import budget_text


class Bar(TrainerCallback):
    """A progress bar on stderr, of the first process."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="train")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs is not None and "agreement" in logs:
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.4g}, budget {budget_text(logs['budget'])}, agreement {logs['agreement']:.1%}"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
