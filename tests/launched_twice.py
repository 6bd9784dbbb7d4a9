"""A process without a GPU whose every repeated step is launched anew as well: both hand the same on to the driver."""

from __future__ import annotations

from typing import Any

import torch
from no_gpu import without_gpu
from stepping import SETTINGS, generate
from tiny import batch, tiny
from torch import Tensor
from triton.compiler.compiler import LazyDict

from gazepatch.kernels.ops import decode, select
from gazepatch.kernels.plan import KernelPlan
from gazepatch.kernels.repeated import Repeated, Step
from gazepatch.ops.decode import Decoded
from gazepatch.patch import patched

GPU = without_gpu(keeps=True)
DECODE, RUN = KernelPlan.decode, Repeated.run
repeated: list[tuple[Step, Tensor]] = []
compared = 0


def plain(argument: Any) -> Any:
    """What two arguments have in common that mean the same."""
    if isinstance(argument, Tensor):
        return argument.data_ptr(), argument.dtype
    return argument.data if isinstance(argument, LazyDict) else argument  # what hooks of launches are told


def noted(known: Repeated, step: Step, splits: int) -> Tensor:
    """The launches of a repeated step."""
    output = RUN(known, step, splits)
    repeated.append((step, output))
    return output


def twice(plan: KernelPlan, *args: Any) -> Decoded:
    """A step, and if it is a repeated one, the launches of the same step anew."""
    global compared
    GPU.launched.clear()
    repeated.clear()
    decoded = DECODE(plan, *args)
    for step, output in repeated:
        flat = step.query.view(*step.query.shape[:2], -1)
        select(*plan.selecting(flat, step.entries, step.score_mod, step.total, step.pending))
        anew = decode(*plan.attending(flat, step.entries, step.score_mod, step.bias))
        again, first = GPU.launched[:2], GPU.launched[2:]
        for one, other in zip(again, first, strict=True):
            assert [plain(x) for x in one if x is not output] == [plain(x) for x in other if x is not anew]
            assert len(one) == len(other)
        compared += 1
    return decoded


def main() -> None:
    KernelPlan.decode, Repeated.run = twice, noted  # type: ignore[method-assign]
    for case in (tiny("llava"), batch(tiny("llava"))):
        for name in ("quarter", "periphery"):
            for kind in ("dynamic", "static"):
                before = compared
                with torch.no_grad(), patched(case.model, SETTINGS[name], backend="triton"):
                    generate(case, 6, cache_implementation=kind, disable_compile=True)
                assert compared - before == 2 * 3  # layers, and steps after the second
    print(compared)


if __name__ == "__main__":
    main()
