"""What follows from rows of the GPU benchmarks, and how they are kept, so that a run goes on after a cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import attention_tables
import comparing
import decode_gpu
from comparing import Row, Tables
from kept import Kept, kernels_digest, table
from shapes import DEFAULTS, WANTED, WHOLE, tiny
from verdict import ATTENTION, FEWEST, MODEL, SELECTION, Value, judged, summary, verdict

H100, H200 = ({"gpu": name, "torch": "2.11"} for name in ("H100", "H200"))


# ---- the verdict, of rows that are made up


def measured(faster: float = 10.0) -> Tables:
    """Rows of a machine on which everything is reached: dense attention takes 1,000 us, gaze `faster` times less."""
    names, tokens = (*WANTED, DEFAULTS), {"8k": 8064, "32k": 32832, "128k": 131328, "256": 256, "576": 576}
    steps, dense, selection, model = [], [], [], []
    for batch, size in ATTENTION:
        place = {"batch": batch, "visual": size}
        dense.append({**place, "us": {"flash": 1000.0, "transformers": 4000.0, "cudnn": "RuntimeError: no kernel"}})
        for name in names:
            selected = 4.0 * batch * tokens[size] / 10000
            row = {"settings": name, **place, "visual_tokens": tokens[size], "step_us": 1000 / faster}
            steps.append({**row, "selected_mb": selected, "decode_gbs": 900.0})
            share = {"select_us": 5.0, "of_step": 0.05}
            selection.append({"settings": name, **place, **share})
    few = [
        {"settings": name, "batch": 1, "visual": size, "visual_tokens": tokens[size], "step_us": 10.0}
        for name in names
        for size in ("256", "576")
    ]
    few_dense = [{"batch": 1, "visual": size, "us": {"flash": 10.0}} for size in ("256", "576")]
    for batch in MODEL:
        place = {"batch": batch, "visual": "128k"}
        model.append({"side": "dense", **place, "dense_ms": {"flash": 40.0, "transformers": 90.0}})
        model += [{"side": name, **place, "ms": 40.0 / faster} for name in names]
    return {
        "triad": [{"triad_gbs": 1000.0}],
        "steps": steps,
        "dense": dense,
        "selection": selection,
        "few_tokens": few,
        "few_dense": few_dense,
        "model_step": model,
        "prefill": [{"visual": size, "overhead": 0.004} for size in ("8k", "32k")],
    }


def of(tables: Tables, part: str) -> Row:
    (row,) = (row for row in verdict(tables) if part in row["figure"])
    return row


def test_everything_is_reached() -> None:
    rows = verdict(measured())
    assert summary(rows) == f"yes: {len(rows)}"
    assert len(rows) == 2 + len(ATTENTION) + len(SELECTION) + 1 + len(MODEL) + 1 + 2
    assert of(measured(), "batch 16, 32k")["measured"] == 10.0


def test_nothing_is_measured() -> None:
    rows = verdict({})
    assert {row["reached"] for row in rows} == {"not measured"} and {row["measured"] for row in rows} == {None}


def test_the_worst_of_the_settings_counts_and_the_defaults_do_not() -> None:
    tables = measured()
    for row in tables["steps"]:
        if (row["batch"], row["visual"]) == (1, "128k"):
            row["step_us"] = {WANTED[0]: 100.0, WANTED[1]: 250.0, DEFAULTS: 500.0}[row["settings"]]
    row = of(tables, "attention over the best dense, batch 1, 128k")
    assert (row["measured"], row["reached"], row["the_defaults"]) == (4.0, "no", 2.0)
    assert WANTED[1] in row["where"] and "against flash" in row["where"]


def test_a_row_that_is_missing_or_failed_leaves_a_figure_open() -> None:
    tables = measured()
    tables["prefill"].pop()
    assert of(tables, "prompt")["reached"] == "not measured"
    tables["prefill"][0]["overhead"] = 0.03  # what is there is enough to say no
    assert of(tables, "prompt")["reached"] == "no"
    (batch_8, *_) = (row for row in tables["model_step"] if row["batch"] == 8 and row["side"] == "dense")
    del batch_8["dense_ms"]
    batch_8["skipped"] = "does not fit: 75 GiB"
    row = of(tables, "whole step over the best dense, batch 8")
    assert row["reached"] == "not measured" and "75 GiB" in row["where"] and row["measured"] is None
    for row in tables["selection"]:
        if (row["settings"], row["batch"], row["visual"]) == (WANTED[0], 1, "32k"):
            row.pop("select_us")
            row["error"] = "RuntimeError: out of registers"
    assert "out of registers" in of(tables, "selection, microseconds, batch 1, 32k")["where"]


def test_bandwidth_is_judged_by_how_much_is_read() -> None:
    tables = measured()
    for row in tables["steps"]:
        row["decode_gbs"] = 800.0  # enough from 32 MB, too little from 200 MB
    assert of(tables, "from 200 MB")["reached"] == "no" and of(tables, "from 32 MB")["reached"] == "yes"


def test_our_own_kernel_that_reads_everything_is_a_dense_way() -> None:
    tables = measured()
    tables["steps"].append({"settings": WHOLE, "batch": 1, "visual": "8k", "step_us": 500.0})
    row = comparing.row_of(comparing.against_dense(tables), settings=WANTED[0], batch=1, visual="8k")
    assert row is not None
    assert (row["best_dense"], row["over_best_dense"], row["over_transformers"]) == (WHOLE, 5.0, 40.0)
    tables["model_step"].append({"side": WHOLE, "batch": 8, "visual": "128k", "ms": 20.0})
    assert of(tables, "batch 8, 128k")["measured"] == 5.0


def test_every_dense_way_is_told() -> None:
    tables = {"dense": measured()["dense"][:1], "model_step": [{"side": WHOLE, "batch": 8, "visual": "8k", "ms": 1.0}]}
    flash, _, cudnn = comparing.dense_ways(tables)
    assert flash == {"table": "dense", "batch": 1, "visual": "8k", "way": "flash", "us": 1000.0}
    assert cudnn["failed"] == "RuntimeError: no kernel" and "us" not in cudnn


def test_where_gaze_breaks_even() -> None:
    tables = measured()
    assert of(tables, "min_visual_tokens")["measured"] == FEWEST
    for row in tables["few_tokens"]:
        row["step_us"] = 10.0 if row["visual"] == "576" else 12.5
    assert of(tables, "min_visual_tokens")["measured"] == 576
    assert of(tables, "min_visual_tokens")["reached"] == "no"
    row = of(tables, f"anywhere from {FEWEST}")
    assert (row["measured"], row["reached"]) == (0.8, "no") and "256 visual tokens" in row["where"]
    slow = [{"visual_tokens": 1000, "over_best_dense": 0.5}, {"visual_tokens": 500, "over_best_dense": 2.0}]
    assert comparing.break_even(slow) is None


def test_less_is_better_where_it_is() -> None:
    values = [Value(4.0, "here"), Value(6.0, "there")]
    assert judged("x", 5.0, values, None, at_least=False)["reached"] == "no"
    assert judged("x", 6.0, values, None, at_least=False)["measured"] == 6.0


# ---- going on after a cut


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    kept = Kept(tmp_path, H100, "k1", derived=lambda tables: {"count": [{"rows": len(tables["steps"])}]})
    kept.add("steps", {"batch": 1, "visual": "8k"}, {"us": 3.0})
    kept.add("steps", {"batch": 2, "visual": "8k"}, {"error": "out of memory"})
    kept.add("steps", {"batch": 2, "visual": "8k"}, {"us": 4.0, "more": {"a": 1}})  # in its place
    text = (tmp_path / "decode_gpu.txt").read_text()
    assert "H100" in text and "count" in text and "out of memory" not in text
    again = Kept(tmp_path, H100, "k1")
    assert again.said is None and [row["us"] for row in again.tables["steps"]] == [3.0, 4.0]
    assert {row["gpu"] for row in again.tables["steps"]} == {"H100"}
    assert again.has("steps", {"batch": 2, "visual": "8k"}) and again.has("steps", {"batch": 3}) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode_gpu.json", "decode_gpu.txt"]


def test_machines_are_not_mixed(tmp_path: Path) -> None:
    for number, machine in enumerate((H100, H200, H100)):
        kept = Kept(tmp_path, machine, "k1")
        assert kept.tables == {} and (kept.said is None) == (number == 0)
        kept.add("dense", {"batch": number}, {"us": {}})
    assert kept.said is not None and "'H200'" in kept.said and "decode_gpu.before-2.json" in kept.said
    aside = json.loads((tmp_path / "decode_gpu.before-1.json").read_text())
    assert aside["machine"] == H100 and aside["tables"]["dense"][0]["batch"] == 0
    assert (tmp_path / "decode_gpu.before-2.txt").exists()
    assert Kept(tmp_path, H100, "k1", anew=True).tables == {}


def test_kernels_that_changed_are_measured_anew(tmp_path: Path) -> None:
    kept = Kept(tmp_path, H100, "k1")
    for name in ("dense", "steps"):
        kept.add(name, {"batch": 1}, {"us": 1.0})
    kept = Kept(tmp_path, H100, "k2")
    assert set(kept.tables) == {"dense"} and "decode_gpu.before-1.json" in str(kept.said)
    kept.add("dense", {"batch": 2}, {"us": 1.0})
    kept = Kept(tmp_path, H100, "k3")  # nothing of the kernels' own is lost
    assert len(kept.tables["dense"]) == 2 and kept.said is None
    folder = tmp_path / "package" / "kernels" / "device"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("one = 1\n")
    before = kernels_digest(tmp_path / "package")
    (folder / "a.py").write_text("one = 2\n")
    assert kernels_digest(tmp_path / "package") != before


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fail() -> Row:
        raise RuntimeError("once\nand for all")

    def cases(*_: Any) -> list[attention_tables.Case]:
        good = [attention_tables.Case({"n": n}, lambda n=n: asked.append(n) or {"us": float(n)}) for n in range(3)]
        return [good[0], attention_tables.Case({"n": "bad"}, fail), *good[1:]]

    monkeypatch.setattr(decode_gpu, "cases", cases)
    setup = tiny(torch.device("cpu"))
    assert decode_gpu.measure(Kept(tmp_path, H100, "k"), setup, ["steps"], seconds=0.0) is False and asked == []
    kept = Kept(tmp_path, H100, "k")
    kept.add("steps", {"n": 1}, {"us": 7.0})
    assert decode_gpu.measure(kept, setup, ["steps"]) and asked == [0, 2]
    assert [row["n"] for row in kept.tables["steps"]] == [1, 0, "bad", 2]
    assert kept.tables["steps"][2]["error"] == "RuntimeError: once" and kept.tables["steps"][0]["us"] == 7.0
    assert decode_gpu.measure(Kept(tmp_path, H100, "k"), setup, ["steps"], again=True) and asked == [0, 2]
    for _ in range(2):  # nothing is timed with kernels that are wrong, in a second call neither
        with pytest.raises(SystemExit, match="the kernels are wrong here"):
            decode_gpu.measure(Kept(tmp_path, H100, "k"), setup, ["check"])


def test_tables_in_print() -> None:
    rows = [{"a": 1, "b": None, "c": {"d": 1}}, {"a": 0.12345, "e": "x"}]
    assert table(rows).splitlines() == ["    a  b  e", "    1", "0.123     x"]
