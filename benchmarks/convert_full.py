"""Time and memory of `gazepatch convert --full` on a synthetic sharded checkpoint, beside `cp` of the same files.

    python benchmarks/convert_full.py DIR [--gigabytes 8] [--json]

Makes the checkpoint in DIR, runs every way in turn as a process of its own, and takes it away again. Python and
transformers take seconds to start, whatever the size: `an adapter folder` shows how many.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 3
SHARDS = 8


def write_checkpoint(folder: Path, size: int) -> None:
    """A small LLaVA's configuration with shards of random bytes, `size` bytes together."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    noise, names = os.urandom(1 << 26), [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]
    for i, name in enumerate(names):
        held = size // SHARDS
        entry = {f"layer.{i}": {"dtype": "U8", "shape": [held], "data_offsets": [0, held]}}
        header = json.dumps(entry).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            while held:
                held -= file.write(noise[:held])
    index = {"metadata": {"total_size": size}, "weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(command: list[str], out: Path) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a process that writes `out`, which is taken away again."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    shutil.rmtree(out)
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to work: twice the size must fit there")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base, out = args.folder / "base", args.folder / "out"
    convert = [sys.executable, "-m", "gazepatch.cli", "convert", str(base), "-o", str(out)]
    ways = {
        "cp": ["cp", "-r", str(base), str(out)],
        "convert --full": [*convert, "--full"],
        "convert --full --link": [*convert, "--full", "--link"],
        "convert (an adapter folder)": convert,
    }
    write_checkpoint(base, int(args.gigabytes * 1e9))
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    try:
        for _ in range(ROUNDS):
            for name, command in ways.items():
                taken[name].append(run(command, out))
    finally:
        shutil.rmtree(base)
    start_up = statistics.median(seconds for seconds, _ in taken["convert (an adapter folder)"])
    rows = [
        {
            "way": name,
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "peak_megabytes": max(peak for _, peak in runs) / 1e6,
            "of_cp": statistics.median(ours[0] / cp[0] for ours, cp in zip(runs, taken["cp"], strict=True)),
        }
        for name, runs in taken.items()
    ]
    from timing import machine  # not before: a new process counts the memory of the one that started it

    if args.json:
        print(json.dumps({"gigabytes": args.gigabytes, "machine": machine(), "rows": rows}, indent=2))
        return
    print(f"python benchmarks/convert_full.py DIR --gigabytes {args.gigabytes:g}    {machine()}")
    print(f"{args.gigabytes:g} GB in {SHARDS} shards, median of {ROUNDS} rounds\n")
    for row in rows:
        rest = row["seconds"] - (0 if row["way"] == "cp" else start_up)
        print(
            f"{row['way']:28s} {row['seconds']:6.1f} s  {row['of_cp']:5.2f} x cp  {rest:6.1f} s without start-up  "
            f"{row['peak_megabytes']:5.0f} MB at most"
        )


if __name__ == "__main__":
    main()
