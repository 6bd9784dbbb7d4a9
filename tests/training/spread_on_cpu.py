"""Trainings that FSDP2 spreads over processes without a GPU, for tests: accelerate does that with GPUs only.

    python -m torch.distributed.run --nproc-per-node 2 tests/training/spread_on_cpu.py MODEL DATA GAZE TRAININGS

GAZE is a GazeConfig in JSON, TRAININGS a list of keyword arguments of `gazepatch.train`; one that has `stop_at` is
interrupted at the end of that step, and then called again without it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState

import gazepatch
from gazepatch.training import trainer
from gazepatch.training.sharded import is_shard

made, begin = PartialState.__init__, trainer.Lowering.on_step_begin
stop_at = 0


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    """Call processes without a GPU such with one."""
    made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Look whether the model is spread indeed."""
    assert all(is_shard(parameter) for parameter in self.model.parameters())
    begin(self, args, state, control, **kwargs)


def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Interrupt the training."""
    if state.global_step == stop_at:
        raise InterruptedError


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState.__init__ = init  # type: ignore[method-assign]
    trainer.Lowering.on_step_begin = on_step_begin  # type: ignore[method-assign]
    trainer.Lowering.on_step_end = on_step_end  # type: ignore[method-assign]
    model, data, gaze, trainings = sys.argv[1:]
    config = gazepatch.GazeConfig.from_dict(json.loads(gaze))
    for settings in json.loads(trainings):
        stop_at = settings.pop("stop_at", 0)
        if stop_at:
            try:
                gazepatch.train(model, data, config=config, progress=False, **settings)
            except InterruptedError:
                stop_at = 0
        gazepatch.train(model, data, config=config, progress=False, **settings)
    torch.distributed.destroy_process_group()  # while both are there: who ends later would find the other gone
