"""One line that says how far a training is: loss, budget, and agreement with dense."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gazepatch.config import budget_text


class Bar(TrainerCallback):
    """A progress bar on stderr, of the first process; where that is no terminal, a line for every figure."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            terminal = sys.stderr.isatty()
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="train", disable=not terminal
            )

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
        if self.bar is None or logs is None or "loss" not in logs:
            return
        if self.bar.disable:
            print(f"train: step {state.global_step}/{state.max_steps}, {_figures(logs)}", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(_figures(logs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def _figures(logs: dict[str, Any]) -> str:
    figures = f"loss {logs['loss']:.4g}, budget {budget_text(logs['budget'])}"
    return figures + (f", agreement {logs['agreement']:.1%}" if "agreement" in logs else "")
