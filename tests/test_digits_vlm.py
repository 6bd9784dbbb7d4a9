"""The trained models that are shipped load as any other and answer; and the rules that gaze is compared with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

import ask
import boards
import data
import evaluate
import model as builder
import packages
import policies
import scenes
import train
import where
from train import answer_logits
from transformers import AutoModelForImageTextToText, AutoProcessor

import gazepatch

MODELS = Path(ask.MODELS)
BOARD = builder.PRESETS["cpu"].board


@pytest.fixture(scope="module")
def dense() -> Any:
    return AutoModelForImageTextToText.from_pretrained(MODELS / "dense", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(MODELS / "dense")


def right(said: list[str], asked: boards.Asked) -> float:
    return sum(text == answer for text, (_, _, answer) in zip(said, asked.turns, strict=True)) / len(said)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 24e6


def test_dense_answers_over_several_turns(dense: Any, processor: Any) -> None:
    shares = [right(ask.answers(dense, processor, asked), asked) for asked in boards.load()]
    assert sum(shares) / len(shares) >= 0.8


def test_gaze_answers_while_reading_an_eighth() -> None:
    model: Any = gazepatch.load(MODELS / "gaze", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(MODELS / "gaze")
    shares = []
    for asked in boards.load():
        shares.append(right(ask.answers(model, processor, asked), asked))
        assert 0.12 <= gazepatch.stats(model).read_share <= 0.15
        assert gazepatch.stats(model).context_entries > 0
    assert sum(shares) / len(shares) >= 0.75


def test_a_blind_model_knows_nothing(dense: Any, processor: Any) -> None:
    asked = boards.load()[0]
    hidden = [image.point(lambda _: 127) for image in asked.open()]
    blind = boards.Asked(asked.images, asked.turns)
    object.__setattr__(blind, "open", lambda: hidden)
    assert right(ask.answers(dense, processor, blind), asked) <= 0.4


def batch(counts: dict[str, int]) -> data.Batch:
    source = scenes.Digits(torch.rand(50, 8, 8), torch.randint(0, 10, (50,)))
    return data.make_batch(BOARD, source, 3, counts, torch.Generator().manual_seed(1), random.Random(1))


@pytest.mark.parametrize("counts", [{"digit": 3, "colour": 2, "row": 2}, {"frame": 5}], ids=["board", "frames"])
@pytest.mark.parametrize("name", policies.POLICIES)
@torch.no_grad()
def test_a_policy_that_may_read_everything_is_dense(dense: Any, name: str, counts: dict[str, int]) -> None:
    some = batch(counts)
    expected = answer_logits(dense, some)
    with policies.reading_by(dense, policies.POLICIES[name], BOARD, 1.0, some):
        assert torch.allclose(answer_logits(dense, some), expected, atol=1e-4)
    with policies.reading_by(dense, policies.POLICIES[name], BOARD, 0.125, some):
        assert not torch.allclose(answer_logits(dense, some), expected, atol=1e-2)
    assert torch.equal(answer_logits(dense, some), expected)


def test_the_oracle_keeps_the_regions_with_most_attention() -> None:
    some = batch({"digit": 2})
    reading = policies.Reading(BOARD, 1 / 64, BOARD.tokens, policies.asks(some), torch.rand(3, BOARD.tokens))
    scores = torch.zeros(1, 1, 1, 2, 1 + BOARD.tokens + 2)
    scores[..., 0, 1 + 5] = 9.0  # the sixth token: row 0, column 5, so the third cell
    scores[..., 1, 1 + 2 * 16] = 9.0  # the first token of the third row: the ninth cell
    kept = policies.oracle_regions(0, scores, scores, scores, reading)[0, 0, 0]
    assert kept[0].nonzero()[:, 0].tolist() == [4, 5, 20, 21]
    assert kept[1].nonzero()[:, 0].tolist() == [32, 33, 48, 49]


def test_what_a_question_ends_with() -> None:
    some = batch({"digit": 2, "row": 1})
    words = {number: word for word, number in BOARD.vocabulary().items()}
    text = [words[i] for i in some.ids[0, -some.text_tokens :].tolist()]
    at = policies.asks(some)[0].tolist()
    for i, word in enumerate(text):
        if some.turn[0, i] >= 0:
            assert text[at[i]] == "=" and at[i] < i and "=" not in text[at[i] + 1 : i + 1], word
        else:
            assert at[i] == i


PROGRAMS = {module.__name__: module.main for module in (ask, evaluate, train, where)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        PROGRAMS[name]()
    assert capsys.readouterr().out.startswith(f"usage: {name}.py ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate", "this needs scikit-learn and matplotlib: pip install scikit-learn matplotlib"),
        ("evaluate --json", "this needs scikit-learn: pip install scikit-learn"),
        ("where", "this needs scikit-learn: pip install scikit-learn"),
        ("train --out out", "this needs scikit-learn: pip install scikit-learn"),
    ],
)
def test_packages_that_are_missing_are_named(command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda module: None)
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit, match=f"^{message}$"):
        PROGRAMS[command.split()[0]]()
