"""How to launch: block sizes and numbers of programs. They follow from shapes and the device alone, never from data."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gazepatch.backend import MAX_DIM
from gazepatch.kernels.tuned import DECODE

#: Bytes of mean keys that a program of the selection scores at a time, at most.
SCORED_BYTES = 1 << 15
#: Windows that it scores at a time.
LEAST_SCORED, MOST_SCORED = 32, 128
#: Multiprocessors to plan for where kernels are interpreted.
INTERPRETED = 4
#: Regions from which on a program of the selection has twice the warps, and a multiprocessor no room for a second one.
MANY_REGIONS = 2048
#: Of a thread of NVIDIA's, 65,536 of which are those of a multiprocessor.
MAX_REGISTERS = 255
#: Numbers that a thread holds at a time where a program waits for many of them at once.
HELD = 128


class Tuned(NamedTuple):
    """Settings of a decode step.

    Attributes:
        block: Entries of a tile of the decode kernel.
        warps, stages: Its warps, and the stages of its loops.
        programs: How many of it a multiprocessor runs.
        early: It is launched while the selection still runs, for which it then waits (from Hopper on).
    """

    block: int
    warps: int
    stages: int
    programs: int
    early: bool


def tuned_for(architecture: str, dim: int, bytes_per_element: int) -> Tuned:
    """The row of the table, for the next larger head dim of the architecture, or of the next older one that has it.

    From sm_120 on, GPUs for desktops have the shared memory of their older ones again.
    """
    hopper = architecture.startswith("cuda") and 90 < int(architecture[4:]) < 120
    older = ["cuda90", "cuda80"] if hopper else ["cuda80"]
    known = [architecture, *(["gfx942"] if architecture.startswith("gfx") else older)]
    dim, size = min(padded(dim), MAX_DIM), max(bytes_per_element, 2)
    fitting = (key for one in known for key in sorted(DECODE) if key[::2] == (one, size) and key[1] >= dim)
    return Tuned(*DECODE[next(fitting)])


# ---- settings of the kernels, by name; worked out once, not in every layer and step


@functools.cache
def decode_settings(
    architecture: str, rows: int, dim: int, value_dim: int, bytes_per_element: int, longest: int
) -> dict[str, Any]:
    """Settings of the decode kernel, for selections of `rows` query heads and regions of up to `longest` tokens."""
    tuned = tuned_for(architecture, max(dim, value_dim), bytes_per_element)
    return {
        "EARLY": tuned.early,
        "WAITS": _waits(architecture),
        "PER_TILE": regions_per_tile(longest, tuned.block),
        "IN_PIECES": longest > tuned.block,
        # Heads are columns here, of which products need but 8 on NVIDIA's.
        "BLOCK_M": max(8 if architecture.startswith("cuda") else 16, power(rows)),
        "BLOCK_N": tuned.block,
        "BLOCK_D": padded(dim),
        "BLOCK_V": padded(value_dim),
        "BLOCK_G": power(rows),
        # So many results of programs are combined at a time.
        "BLOCK_S": max(1, HELD * 32 * tuned.warps // (power(rows) * padded(value_dim))),
        "PARTS": tuned.warps if apart(max(dim, value_dim), bytes_per_element) else 1,
        # Of float32: three products of tensor cores are as exact, where registers hold what they take.
        "PRECISION": "tf32x3" if architecture.startswith("cuda") and padded(dim) * bytes_per_element <= 512 else "ieee",
        "num_warps": tuned.warps,
        "num_stages": tuned.stages,
        "enable_fp_fusion": True,  # said here and below, as Triton's own choice changes with 3.10
        **({"launch_pdl": True} if tuned.early else {}),
        **({"maxnreg": MAX_REGISTERS} if _has_all_registers(architecture, tuned) else {}),
    }


@functools.cache
def select_settings(
    architecture: str, group: int, windows: int, regions: int, dim: int, bytes_per_element: int, splits: int
) -> dict[str, Any]:
    """Settings of the selection, for `regions` of `windows` each that `splits` programs score."""
    scored = scored_regions(windows, dim, bytes_per_element, regions, splits)
    # No fewer than the lanes of a warp hold, by fours: they never share out heads.
    warps, block_all = 8 if regions > MANY_REGIONS else 4, max(128, scored, power(regions))
    once = splits * scored >= padded_regions(regions)
    return {
        "EARLY": tuned_for(architecture, dim, bytes_per_element).early,
        "WAITS": _waits(architecture),
        # Products of float32 are each thread's own: they and all loads at once are more than registers hold.
        "ONCE": once and bytes_per_element <= 2,
        # So many heads' weights of all regions are held at a time, and what there is of their tiles.
        "HEADS": max(1, min(power(group), HELD * 32 * warps // max(block_all, 4 * block_all // scored))),
        "BLOCK_M": padded(group),
        "BLOCK_R": scored,
        "BLOCK_C": power(windows),
        "BLOCK_D": padded(dim),
        "BLOCK_ALL": block_all,
        "num_warps": warps,
        # A program with a single tile has nothing to load ahead, and what would do so is long.
        "num_stages": 1 if once else _stages(architecture),
        # A product that is rounded in one thread and not in another would break ties.
        "enable_fp_fusion": False,
    }


@functools.cache
def prefill_settings(architecture: str, dim: int, value_dim: int, bytes_per_element: int) -> dict[str, int]:
    """Settings of the kernels for a prompt: small enough for the two accumulators of the gradients. UNMEASURED."""
    sizes = {"BLOCK_D": padded(dim), "BLOCK_V": padded(value_dim)}
    row = max(sizes.values()) * bytes_per_element
    block = 32 if bytes_per_element <= 2 and row <= 256 else 16
    # The widest rows leave no room for a third stage in the 99 KiB that GPUs for desktops have.
    stages = min(_stages(architecture), 2 if row > 512 else 3)
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}
    return {"BLOCK_M": block, "BLOCK_N": block, **sizes, **options}


def _stages(architecture: str) -> int:
    """On NVIDIA's, with fewer than 3, entries are asked for only when those before them are done with."""
    return 2 if architecture.startswith("gfx") else 3


def _has_all_registers(architecture: str, tuned: Tuned) -> bool:
    """Whether threads may have all they can: ptxas may spill some to make room for programs that nobody launches."""
    threads = 32 * tuned.warps * tuned.programs
    return architecture.startswith("cuda") and (1 << 16) // threads > MAX_REGISTERS


def _waits(architecture: str) -> bool:
    """Whether waves have to wait for their stores before they arrive: on GCN and CDNA."""
    return architecture.startswith("gfx9")


def forget() -> None:
    """Work settings out anew: the table has changed."""
    decode_settings.cache_clear()
    select_settings.cache_clear()


# ---- sizes


def power(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def apart(dim: int, bytes_per_element: int) -> bool:
    """Whether each warp of the decode kernel attends by itself: it holds whole rows then, as far as registers do."""
    return padded(dim) * bytes_per_element <= 256


def padded(dim: int) -> int:
    """The power of two that a head dim is padded to; products need 16 at least."""
    return max(16, power(dim))


def scored_regions(windows: int, dim: int, bytes_per_element: int, regions: int, programs: int) -> int:
    """Regions that a program of the selection scores at a time: a power of two, one tile each if programs suffice."""
    each = power(-(-padded_regions(regions) // programs)) * power(windows)
    most = min(MOST_SCORED, SCORED_BYTES // (padded(dim) * bytes_per_element))
    return max(1, min(most, max(LEAST_SCORED, each)) // power(windows))


def selecting_programs(windows: int, dim: int, bytes_per_element: int, regions: int, most: int) -> int:
    """Programs of the selection, up to `most`, that a key head has: one where that can do with one tile."""
    if scored_regions(windows, dim, bytes_per_element, regions, 1) >= regions:
        return 1
    tiles = -(-padded_regions(regions) // scored_regions(windows, dim, bytes_per_element, regions, most))
    return even_splits(tiles, most)


def padded_regions(regions: int) -> int:
    """Numbers of a row of what the selection finds of regions, so that it can be loaded 16 bytes at a time."""
    return -(-regions // 16) * 16


def most_tiles(regions: int, windows: int) -> int:
    """Tiles that a selection scores, at most: whatever the head dim."""
    return -(-padded_regions(regions) // max(1, LEAST_SCORED // power(windows)))


def regions_per_tile(longest: int, block: int) -> int:
    """Regions of up to `longest` tokens that a tile of `block` entries holds: a power of two, 1 for longer ones."""
    return max(1, block // power(longest))


def tiles_of(runs: int, longest: int, block: int) -> int:
    """Tiles of so many regions of up to `longest` tokens, none of which crosses the end of a region."""
    return -(-runs // regions_per_tile(longest, block)) * -(-longest // block)


def scoring_programs(regions: int) -> int:
    """Programs of the selection that run on a multiprocessor at the same time."""
    return 1 if regions > MANY_REGIONS else 2


def row_stride(table: Tensor) -> int:
    """Of a `[b, ...]` table; 0 where one row serves all."""
    return table.stride(0) if len(table) > 1 else 0


# ---- the device


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it this one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


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


# ---- programs


def most_splits(groups: int, programs: int) -> int:
    """Programs of one of `groups` so that there are up to `programs` in all, which run at the same time, or one each.

    With more, some would begin when others have ended, and all would wait for those.
    """
    return max(1, programs // groups)


def balanced_splits(tiles: int, results: int) -> int:
    """Programs that share out `tiles`, each of which is as long to read as `results` of them are for the last one.

    A program reads `tiles / n`, and the last one `n` results after that: together least where both are the same.
    """
    return max(1, int((tiles * results) ** 0.5))  # not `math.isqrt`, which torch.compile cannot trace


def even_splits(tiles: int, most: int) -> int:
    """As few programs, up to `most`, as share out `tiles` with no more for any of them than `most` would have."""
    each = -(-tiles // most)
    return -(-tiles // max(each, 1)) or 1
