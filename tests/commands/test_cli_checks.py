"""The commands that compare gaze with dense: verify, eval and bench."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commanding import fails, gaze

import gazepatch
from gazepatch.config import GazeConfig


def test_verify(artefact: Path, page: Path) -> None:
    result = gaze("verify", artefact, page, "what is this ?")
    assert result.exit_code == 0, result.output
    assert "dense equivalence" in result.stdout and "FAILED" not in result.stdout
    assert "at budget 1.0, 4 steps" in result.stdout
    report = json.loads(gaze("verify", artefact, page, "what is this ?", "--json").stdout)
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    fails(2, "does not exist", "verify", artefact, "no.png", "this")


def test_verify_fails_loudly(artefact: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gazepatch.verification import Check, Verification

    bad = Verification([Check("dense equivalence", float("nan"), 1e-5, "largest logit difference")])
    monkeypatch.setattr(gazepatch, "verify", lambda *_: bad)
    result = gaze("verify", artefact, page, "this")
    assert result.exit_code == 1 and "FAILED" in result.stdout
    report = json.loads(gaze("verify", artefact, page, "this", "--json").stdout)
    assert report == {
        "passed": False,
        "checks": [
            {"name": "dense equivalence", "value": None, "limit": 1e-5}
            | {"note": "largest logit difference", "passed": False}
        ],
    }


def test_verify_brings_its_own_image(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def verify(model: object, inputs: object) -> object:
        seen.append(inputs)
        from gazepatch.verification import Verification

        return Verification([])

    monkeypatch.setattr(gazepatch, "verify", verify)
    # The reader takes pages of one size only, whatever the picture: its processor does not resize.
    result = gaze("verify", artefact)
    assert result.exit_code == 0, result.output
    assert "pixel_values" in seen[0]  # type: ignore[operator]


def test_eval(base: Path, tmp_path: Path, page: Path) -> None:
    said = {"role": "assistant", "content": "harbour"}
    lines = [json.dumps({"messages": [{"role": "user", "content": "<image> this ?"}, said], "images": [str(page)]})] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = GazeConfig(min_visual_tokens=0, periphery=False)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))
    data = ("eval", artefact, tmp_path / "data.jsonl")
    (own,) = json.loads(gaze(*data, "--json").stdout)
    assert own["budget"] == 0.25 and 0 <= own["agreement"] <= 1 and own["divergence"] > 0
    result = gaze(*data, "--budgets", "1.0,2", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    every, two = json.loads(result.stdout)
    assert (every["budget"], two["budget"]) == (1.0, 2) and every["tokens"] * 3 == own["tokens"] * 2
    assert every["dense_accuracy"] == two["dense_accuracy"] == own["dense_accuracy"]
    assert every["read_share"] == 1.0 and two["read_share"] < own["read_share"] < 0.35
    assert (
        "agrees with dense" in gaze(*data).stdout and own["read_whole"] == 0 and "read whole" not in gaze(*data).stdout
    )
    table = gaze(*data, "--budgets", "1.0,2", "--limit", "1").stdout
    assert [line.split("  ")[0] for line in table.splitlines()] == ["budget", "1.0", "2 regions"]
    assert "visual entries read" in table and "  100.0%  " in table and f"  {two['read_share']:.1%}  " in table
    few = gaze("eval", base, tmp_path / "data.jsonl", "--limit", "2")
    assert "  100.0%  " in few.stdout
    many = gaze("eval", base, tmp_path / "data.jsonl", "--limit", "2", "--min-visual-tokens", "0", "--json")
    assert json.loads(many.stdout)[0]["read_whole"] == 0 and json.loads(many.stdout)[0]["read_share"] < 0.35
    assert "2 of these conversations were read whole: fewer than min_visual_tokens=2048" in few.stdout
    fails(2, "expected shares or numbers", *data, "--budgets", "half")
    fails(2, "budget must be a share of the regions", *data, "--budgets", "0.5,0")
    (tmp_path / "words.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "this ?"}, said]}))
    words = gaze("eval", artefact, tmp_path / "words.jsonl")
    assert "  no images  " in words.stdout
    assert "Nothing will gaze: no record of" in words.stderr and "got the keys messages in" in words.stderr
    assert "Nothing will gaze" not in few.stderr


def test_eval_reads_the_data_before_the_weights(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gazepatch, "load", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "data.jsonl").write_text("{")
    fails(1, "data.jsonl, line 1: must be JSON", "eval", artefact, tmp_path / "data.jsonl")
    fails(1, "expected a file of records, got nothing at", "eval", artefact, tmp_path / "gone.jsonl")


def test_bench(base: Path, tmp_path: Path, page: Path) -> None:
    settings = GazeConfig(min_visual_tokens=0)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))
    result = gaze("bench", artefact, page, "this ?", "--new-tokens", "3", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    timing = json.loads(result.stdout)
    assert timing["rounds"] == 2 and timing["new_tokens"] == 3 and 0 < timing["read_share"] < 1
    assert timing["speedup_min"] <= timing["speedup"] <= timing["speedup_max"]
    assert all(timing[name] > 0 for name in ("prompt_ms", "dense_prompt_ms", "token_ms", "dense_token_ms"))
    assert "times as fast" in gaze("bench", artefact, "--new-tokens", "2", "--rounds", "1").stdout
