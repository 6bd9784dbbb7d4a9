"""Launch settings, and the machine code that comes of them."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from gazepatch.kernels import tuned
from gazepatch.kernels.settings import (
    apart,
    balanced_splits,
    decode_settings,
    even_splits,
    forget,
    most_splits,
    most_tiles,
    padded_regions,
    select_settings,
    selecting_programs,
    tuned_for,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_what_an_architecture_lacks_is_that_of_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, table = (128, 8, 2, 1, True), tuned.DECODE
    monkeypatch.setitem(table, ("cuda100", 128, 2), measured)
    assert tuned_for("cuda100", 72, 2) == measured
    assert tuned_for("cuda100", 128, 4) == table["cuda90", 128, 4]
    assert tuned_for("cuda100", 256, 2) == table["cuda90", 256, 2]
    assert tuned_for("cuda120", 128, 2) == table["cuda80", 128, 2]  # which has as little shared memory
    assert tuned_for("cuda86", 40, 2) == table["cuda80", 64, 2]
    assert tuned_for("gfx950", 128, 2) == table["gfx942", 128, 2]
    for architecture, dim, size in list(table):
        assert tuned_for(architecture, dim, size) == table[architecture, dim, size]


def test_registers_are_those_that_programs_leave() -> None:
    forget()
    assert decode_settings("cuda90", 4, 128, 128, 2, 64)["maxnreg"] == 255
    assert "maxnreg" not in decode_settings("cuda90", 4, 128, 128, 4, 64)  # two programs of 256 threads
    assert "maxnreg" not in decode_settings("gfx942", 4, 128, 128, 2, 64)


def test_every_part_of_a_tile_is_as_large_as_products_need() -> None:
    for (architecture, dim, size), (block, warps, *_) in tuned.DECODE.items():
        assert block >= 16 * warps or not apart(dim, size), (architecture, dim, size)


@pytest.mark.parametrize(("groups", "programs", "splits"), [(8, 132, 16), (128, 132, 1), (200, 132, 1), (1, 132, 132)])
def test_no_program_waits_for_others_to_end(groups: int, programs: int, splits: int) -> None:
    assert most_splits(groups, programs) == splits


@pytest.mark.parametrize("tiles", [1, 7, 60, 900])
@pytest.mark.parametrize("results", [1, 4, 9])
def test_the_last_program_has_as_much_to_read_as_the_others(tiles: int, results: int) -> None:
    def time(programs: int) -> float:
        return tiles / programs + programs / results

    balanced = balanced_splits(tiles, results)
    assert time(balanced) <= 1.1 * min(map(time, range(1, tiles * results + 1)))
    shared = even_splits(tiles, balanced)
    assert 1 <= shared <= balanced and -(-tiles // shared) == -(-tiles // balanced)


@pytest.mark.parametrize("regions", [1, 64, 100, 129, 500, 2052, 3648, 8192])
def test_every_region_is_scored_in_a_tile(regions: int) -> None:
    for windows, (dim, size), most in itertools.product([1, 4, 9, 64], [(64, 2), (128, 2), (256, 4)], [1, 3, 33, 132]):
        programs = selecting_programs(windows, dim, size, regions, most)
        settings = select_settings("cuda90", 7, windows, regions, dim, size, programs)
        tiles = -(-padded_regions(regions) // settings["BLOCK_R"])
        assert 1 <= programs <= min(most, tiles) and tiles <= most_tiles(regions, windows)
        assert settings["ONCE"] == (programs == tiles and size == 2)
        assert settings["BLOCK_ALL"] >= regions and settings["BLOCK_ALL"] % settings["BLOCK_R"] == 0


@pytest.mark.parametrize("kernel", ["decode", "select"])
def test_waves_wait_for_their_stores_before_they_arrive(kernel: str) -> None:
    # On CDNA alone a barrier does not, and whoever comes last would combine what is not there yet.
    made = f"compile_kernels.compiled({kernel!r}, 'gfx942', 'bf16', 128, 4, True)"
    code = f"import checkout, compile_kernels; print({made}.asm['amdgcn'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)
    assert run.returncode == 0, run.stderr
    instructions = [line.split("//")[0].strip() for line in run.stdout.splitlines()]
    instructions = [line for line in instructions if re.match(r"[a-z]+_\w+", line)]
    release = next(i for i, line in enumerate(instructions) if line.startswith("buffer_wbl2"))
    barrier = max(i for i, line in enumerate(instructions[:release]) if line == "s_barrier")
    waits = max(i for i, line in enumerate(instructions[:barrier]) if re.match(r"s_waitcnt.*vmcnt\(0\)", line))
    assert not any(re.match(r"(global|buffer|flat)_store", line) for line in instructions[waits:release])
