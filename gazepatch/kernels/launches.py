"""How to launch: block sizes and numbers of programs. They follow from shapes and the device alone, never from data."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from gazepatch.kernels.tuned import DECODE

#: Windows that a program of the selection scores at a time, counting the padding of regions.
SCORED = 64
#: Multiprocessors to plan for where kernels are interpreted.
INTERPRETED = 4


class Launch(NamedTuple):
    """Settings of the decode kernel: entries of a tile, warps, stages of its loops, programs per multiprocessor."""

    block: int
    warps: int
    stages: int
    programs: int


def padded(dim: int) -> int:
    """The power of two that a head dim is padded to; products need 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def decode_launch(architecture: str, dim: int, bytes_per_element: int) -> Launch:
    """The row of the table, for the next larger head dim of the next older architecture that it has."""
    if architecture not in {key[0] for key in DECODE}:
        architecture = "gfx942" if architecture.startswith("gfx") else "cuda90" if architecture > "cuda90" else "cuda80"
    dims = sorted(key[1] for key in DECODE if key[0] == architecture and key[2] == max(bytes_per_element, 2))
    fitting = next(known for known in dims if known >= min(padded(dim), dims[-1]))
    return Launch(*DECODE[architecture, fitting, max(bytes_per_element, 2)])


@functools.cache
def architecture(device: torch.device) -> str:
    """`cuda90` and the like, `gfx942` and the like."""
    if device.type != "cuda":
        return "cuda80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"cuda{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a small number where kernels are interpreted, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def most_splits(groups: int, programs: int) -> int:
    """Programs of one of `groups` so that there are `programs` in all, or one each."""
    return max(1, -(-programs // groups))
