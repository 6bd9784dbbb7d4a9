"""The ways of attending in one decode step: ours whole and in parts, and every dense one that a machine may have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from on_gpu import Layers, first_line, graph_ms, layers_needed
from shapes import Setup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from gazepatch.config import GazeConfig
from gazepatch.kernels.ops import decode, select
from gazepatch.layout import Grid
from gazepatch.ops.decode import DecodePlan
from gazepatch.score_mod import ScoreMod

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TRANSFORMERS = "transformers"

Calls = list[Callable[[], object]]


def case(
    setup: Setup, grid: Grid, batch: int, config: GazeConfig, alone: str | None = None
) -> tuple[Layers, DecodePlan]:
    """As many layers as a cold cache needs, and the kernels' plan; `alone`: if nothing but these bytes are read."""
    like = torch.empty(0, dtype=setup.dtype, device=setup.device)
    heads = setup.heads, setup.key_heads, setup.dim
    one = Layers(grid, config, (1, *heads), 1, like)
    read = one.bytes_read(one.plan(DecodePlan))
    touched = batch * (read[alone] if alone else sum(read.values()) - read["dense"])
    layers = Layers(
        grid, config, (batch, *heads), layers_needed(touched, 2 * batch * read["dense"], setup.device), like
    )
    return layers, layers.plan()


# ---- ours


def gaze(layers: Layers, plan: Any, score_mod: ScoreMod) -> Calls:
    """Selection and decode of every layer."""
    both = zip(layers.queries, layers.entries, strict=True)
    # As a cache has one where the kernel counts what it reads.
    total = torch.zeros(1, dtype=torch.int64, device=layers.queries[0].device) if plan.counts_itself else None
    return [lambda q=q, e=e: plan.decode(q, e, score_mod, None, total) for q, e in both]


def selections(setup: Setup, layers: Layers, plan: Any) -> Calls:
    """The selection alone."""
    total = torch.zeros(1, dtype=torch.int64, device=setup.device)
    both = zip(layers.queries, layers.entries, strict=True)
    launches = [plan.selecting(q[:, :, 0], e, setup.score_mod, total, None) for q, e in both]
    return [lambda arguments=arguments: select(*arguments) for arguments in launches]


def attentions(setup: Setup, layers: Layers, plan: Any) -> Calls:
    """Decode alone, of the regions that a selection has left in the plan."""
    plan.decode(layers.queries[0], layers.entries[0], setup.score_mod)
    both = zip(layers.queries, layers.entries, strict=True)
    launches = [plan.attending(q[:, :, 0], e, setup.score_mod, None) for q, e in both]
    return [lambda arguments=arguments: decode(*arguments) for arguments in launches]


# ---- dense


def dense(setup: Setup, layers: Layers, flex: bool) -> dict[str, float | str]:
    """Microseconds of every way to read everything; a reason for those that this machine does not have."""
    found: dict[str, float | str] = {}
    for name, timed in _dense(setup, layers, flex):
        try:
            found[name] = 1e3 * timed()
        except Exception as error:  # said in the results
            found[name] = first_line(error)
    return found


def _dense(setup: Setup, layers: Layers, flex: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    stored = [(torch.cat([e.visual_key, e.key], 2), torch.cat([e.visual_value, e.value], 2)) for e in layers.entries]
    both = list(zip(layers.queries, stored, strict=True))
    for name, backend in BACKENDS.items():
        for how, step in (("heads grouped", _grouped), ("enable_gqa", _gqa)):
            yield f"{name}, {how}", lambda b=backend, s=step: _with(b, [s(q, k, v) for q, (k, v) in both])
    new = layers.queries[0].new_zeros(layers.shape[0], setup.key_heads, 1, setup.dim)
    yield TRANSFORMERS, lambda: graph_ms([_appended(q, k, v, new) for q, (k, v) in both])
    if flex:
        yield "flex attention", lambda: graph_ms(_flex(both))


def _with(backend: SDPBackend, steps: Calls) -> float:
    with sdpa_kernel(backend):
        return graph_ms(steps)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    rows = q.view(len(q), k.shape[1], -1, q.shape[3])
    return lambda: sdpa(rows, k, v)


def _gqa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    return lambda: sdpa(q, k, v, enable_gqa=True)


def _flex(both: list[Any]) -> Calls:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # every shape is compiled for itself, more of them than are allowed
    compiled = torch.compile(flex_attention, dynamic=False)
    return [lambda q=q, k=k, v=v: compiled(q, k, v, enable_gqa=True) for q, (k, v) in both]


def _appended(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Callable[[], object]:
    """What transformers' DynamicCache and sdpa do: copy the cache with the new entry after it, then attend."""
    return lambda: sdpa(q, torch.cat([k, new], 2), torch.cat([v, new], 2), enable_gqa=True)
