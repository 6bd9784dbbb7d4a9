"""`results.md` and its plot out of the rows that `evaluate.py` measured."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

import gazepatch

COLUMNS = ("T1", "T2", "T2 cells", "T3", "most", "T4", "T5")
PLOTTED = ("T1", "T2", "most", "T4")
START, STOP = "<!-- table -->", "<!-- end of table -->"
Row = dict[str, Any]


def write(folder: Path, rows: list[Row], sequences: int) -> None:
    """Put the table between the marks in `results.md`, and draw `results.svg`; the text around the table stays."""
    path = folder / "results.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    after = rest.partition(STOP)[2]
    text = f"{before}{START}\n\n{_machine(sequences)}\n\n{table(rows)}\n\n{STOP}{after}"
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
    plot(rows, folder / "results.svg")


def table(rows: list[Row]) -> str:
    """Markdown, in per cent."""
    lines = ["| reads | share | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for row in rows:
        figures = " | ".join(f"{100 * row[name]:.1f}" for name in COLUMNS)
        lines.append(f"| {row['reading']} | {100 * row['share']:g} % | {figures} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """One panel a task: exact match over the share that is read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if "blind" not in row["reading"]:
            curves[row["reading"]].append(row)
    dense = curves.pop("dense")[0]
    figure, panels = plt.subplots(1, len(PLOTTED), figsize=(4 * len(PLOTTED), 4.2), sharey=True)
    for panel, task in zip(panels, PLOTTED, strict=True):
        panel.axhline(100 * dense[task], color="black", linewidth=1, linestyle=":", label="dense")
        for name, points in curves.items():
            ours = name.startswith("gaze")
            panel.plot(
                [100 * p["share"] for p in points],
                [100 * p[task] for p in points],
                marker="o" if ours else ".",
                linewidth=2 if ours else 1,
                linestyle="-" if ours else "--",
                label=name,
            )
        panel.set(xscale="log", title=task, xlabel="visual entries read, %", ylim=(-2, 102))
        panel.set_xticks([6, 12.5, 25, 50, 100], ["6", "12.5", "25", "50", "100"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("answers exactly right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _machine(sequences: int) -> str:
    return (
        f"{sequences} sequences of one board and {sequences} of several, digits that training never saw; "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, gazepatch {gazepatch.__version__}. In per cent."
    )
