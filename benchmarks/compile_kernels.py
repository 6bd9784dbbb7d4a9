"""Machine code of every kernel, for every target, without a GPU: `python benchmarks/compile_kernels.py [--json]`.

Prints registers, spills and shared memory of each. Exits with 1 when the decode kernel spills registers to memory, or
when a kernel takes more shared memory than the smallest GPUs have that run it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gazepatch.kernels.device.decode import decode_kernel
from gazepatch.kernels.device.means import means_kernel
from gazepatch.kernels.device.prefill import forward_kernel, key_gradient_kernel, query_gradient_kernel
from gazepatch.kernels.device.selection import select_kernel
from gazepatch.kernels.settings import decode_settings, padded, prefill_settings, select_settings

TARGETS = {
    "cuda80": GPUTarget("cuda", 80, 32),
    "cuda90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Shared memory of the smallest GPUs that take these settings: sm_86, sm_89 and sm_120 have that of the first.
MAX_SHARED = {"cuda80": 99 << 10, "cuda90": 99 << 10, "gfx942": 64 << 10}
#: Of the decode kernel, whose settings are of an architecture (`gazepatch.kernels.settings.tuned_for`).
MAX_SHARED_BY_DECODE = MAX_SHARED | {"cuda90": 227 << 10}
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
DIMS = (64, 80, 96, 128, 256)
KERNELS = ("decode", "select", "means", "prefill", "query_gradient", "key_gradient")
GROUPS = (4, 7)  # query heads a key head: Llama 3 and Qwen2.5, say
WINDOWS, REGIONS, TOKENS = 4, 4096, 64

#: Settings that are Triton's, not those of a kernel.
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")

#: What models and settings may leave out: pointers, and the constants that say so.
OF_PROMPT = ("bias",), ("HAS_BIAS", "CAPPED")
OPTIONAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "decode": (
        ("bias", "logits", "taken", "mean_values", "sinks"),
        ("HAS_BIAS", "PERIPHERY", "HAS_SINKS", "CAPPED", "EARLY"),
    ),
    "select": (
        ("total", "key", "value", "new_key", "new_value", "filled"),
        ("COUNTS", "APPENDS", "PERIPHERY", "CAPPED", "EARLY"),
    ),
    "means": ((), ()),
    **dict.fromkeys(("prefill", "query_gradient", "key_gradient"), OF_PROMPT),
}

#: Arguments whose values are multiples of 16 wherever a head dim is: pointers, and strides but for those of tables.
ALIGNED = re.compile(
    r"stride_(query|(new_)?key|(new_)?value|entry|visual_key|visual_value|mean)_(batch|head|token|window)|padded"
)


def build(kernel: str, target: str, dtype: str, dim: int, group: int, bare: bool = False) -> dict[str, Any]:
    """Compile one kernel, as `compiled` does, and say what it takes."""
    made = compiled(kernel, target, dtype, dim, group, bare)
    usage = _amd(made.asm["amdgcn"]) if target.startswith("gfx") else _nvidia(made.asm["cubin"])
    row = {"kernel": kernel, "target": target, "dtype": dtype, "head_dim": dim, "group": group}
    row |= {"warps": made.metadata.num_warps, "stages": made.metadata.num_stages}
    return {**row, **usage, "shared_bytes": made.metadata.shared}


def compiled(kernel: str, target: str, dtype: str, dim: int, group: int, bare: bool = False) -> Any:
    """One kernel with everything in it, or `bare` with nothing that may be left out."""
    function, pointers, constants = globals()[f"_{kernel}"](target, dtype, dim, group)
    constants |= {parameter.name: parameter.default for parameter in function.params if parameter.has_default}
    if bare:
        absent, off = OPTIONAL[kernel]
        pointers = {name: kind for name, kind in pointers.items() if name not in absent}
        constants |= dict.fromkeys(absent) | dict.fromkeys(off, False)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        scalar = "fp32" if name in ("scale", "softcap") else "i32"
        signature[name] = "constexpr" if name in constants else pointers.get(name, scalar)
        if signature[name] != "constexpr" and (name in pointers or ALIGNED.fullmatch(name)):
            attributes[(i,)] = [["tt.divisibility", 16]]
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def _decode(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    data = f"*{dtype}"
    names = ("query", "key", "value", "visual_key", "visual_value", "mean_values", "output")
    pointers = dict.fromkeys(names, data) | dict.fromkeys(("bias", "logits", "partial", "max_and_sum"), "*fp32")
    pointers |= {"runs": "*i64", "taken": "*i8", "arrived": "*i32", "sinks": data}
    settings = decode_settings(target, group, dim, dim, DTYPES[dtype], TOKENS)
    constants = {
        "SELECTIONS": 1,
        "ROWS": group,
        "DIM": dim,
        "VALUE_DIM": dim,
        "WINDOWS": WINDOWS,
        "HAS_BIAS": True,
        "HAS_RUNS": True,
        "PERIPHERY": True,
        "HAS_SINKS": True,
        "CAPPED": True,
    }
    return decode_kernel, pointers, constants | settings | {"EARLY": target == "cuda90"}


def _select(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    names = ("query", "mean_keys", "key", "value", "new_key", "new_value")
    pointers = dict.fromkeys(names, f"*{dtype}")
    pointers |= dict.fromkeys(("log_counts", "logits", "weights", "tile_max_and_sum"), "*fp32")
    pointers |= {"budget": "*i32", "arrived": "*i32", "taken": "*i8"}
    pointers |= dict.fromkeys(("table", "runs", "total", "filled"), "*i64")
    constants = {
        "GROUP": group,
        "DIM": dim,
        "VALUE_DIM": dim,
        "WINDOWS": WINDOWS,
        "PER_HEAD": False,
        "BY_MAX": False,
        "PERIPHERY": True,
        "COUNTS": True,
        "CAPPED": True,
        "APPENDS": True,
        "BLOCK_V": padded(dim),
        "stride_mean_dim": 1,
    }
    settings = select_settings(target, group, WINDOWS, REGIONS, dim, DTYPES[dtype], 1)
    return select_kernel, pointers, constants | settings | {"EARLY": target == "cuda90"}


def _means(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    pointers = {"entries": f"*{dtype}", "means": f"*{dtype}", "start": "*i32", "length": "*i32"}
    sizes = {"DIM": dim, "BLOCK_W": 4, "BLOCK_T": 16, "BLOCK_D": padded(dim)}
    return means_kernel, pointers, sizes | {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def _prefill(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    return forward_kernel, *_routed(target, dtype, dim, group, "output")


def _query_gradient(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    return query_gradient_kernel, *_routed(target, dtype, dim, group, "d_output", "d_query")


def _key_gradient(target: str, dtype: str, dim: int, group: int) -> tuple[Any, ...]:
    return key_gradient_kernel, *_routed(target, dtype, dim, group, "d_output", "d_key", "d_value")


def _routed(target: str, dtype: str, dim: int, group: int, *more: str) -> tuple[Any, ...]:
    pointers = dict.fromkeys(("query", "key", "value", *more), f"*{dtype}")
    pointers |= dict.fromkeys(("bias", "lse", "delta"), "*fp32")
    pointers |= {"region_of": "*i32", "taken": "*i8", "positions": "*i32"}
    constants = {"GROUP": group, "SELECTIONS": 1, "DIM": dim, "VALUE_DIM": dim, "HAS_BIAS": True, "CAPPED": True}
    return pointers, constants | prefill_settings(target, dim, dim, DTYPES[dtype])


def _nvidia(cubin: bytes) -> dict[str, int]:
    """From NVIDIA's own tool, which comes with Triton. The kernels keep no arrays: a stack holds spills alone."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return {"registers": numbers["REG"], "spilled_bytes": numbers["STACK"] + numbers["LOCAL"]}


def _amd(assembly: str) -> dict[str, int]:
    """From the metadata at the end of the assembly. Scalar registers spill to vector registers, not to memory."""
    names = {"registers": "vgpr_count", "spilled_bytes": "private_segment_fixed_size"}
    found = {name: re.search(rf"\.{field}:\s*(\d+)", assembly) for name, field in names.items()}
    return {name: int(match[1]) for name, match in found.items() if match is not None}


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of a table."""
    yield "Registers a thread, bytes spilled to memory, and bytes of shared memory; compiled, not run."
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"Group: query heads a key head. decode and select: soft cap, sinks, bias, periphery, {WINDOWS} windows a"
    yield f"region; select: up to {REGIONS} regions. gfx942 counts vector and accumulation registers together."
    yield ""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="this one alone; may be repeated")
    parser.add_argument("--target", choices=TARGETS, action="append", help="this one alone; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="this one alone; may be repeated")
    parser.add_argument("--dim", type=int, action="append", help="this head dim alone; may be repeated")
    parser.add_argument("--group", type=int, action="append", help=f"so many query heads a key head, not {GROUPS}")
    parser.add_argument("--bare", action="store_true", help="without what models and settings may leave out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("-o", "--out", type=Path, help="write the table to FILE")
    options = parser.parse_args()
    groups = options.group or GROUPS
    wanted = itertools.product(
        options.kernel or KERNELS,
        options.target or TARGETS,
        options.dtype or DTYPES,
        options.dim or DIMS,
        groups,
        [options.bare],
    )
    once = (each for each in wanted if each[0] != "means" or each[4] == groups[0])  # it knows no queries
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(build, *zip(*once, strict=True)))
    table = "\n".join(report(rows)) + "\n"
    print(json.dumps({"versions": versions(), "kernels": rows}, indent=1) if options.json else table, end="")
    if options.out is not None:
        partial = options.out.with_suffix(".partial")
        partial.write_text(table)
        partial.rename(options.out)
    failed = [*_wrong(rows)]
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    return 1 if failed else 0


def _wrong(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["kernel"] == "decode" and row["spilled_bytes"]:
            yield f"the decode kernel spills: {row}"
        most = (MAX_SHARED_BY_DECODE if row["kernel"] == "decode" else MAX_SHARED)[row["target"]]
        if row["shared_bytes"] > most:
            yield f"takes more than the {most} bytes of shared memory there are: {row}"


if __name__ == "__main__":
    sys.exit(main())
