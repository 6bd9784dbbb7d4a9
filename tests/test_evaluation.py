"""`evaluate` and `bench` on a tiny model: what they say is what forwards by hand say, and the model stays as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_reader import write_reader

import gazepatch
from gazepatch import ConfigError, GazeConfig, PatchError
from gazepatch.cli.opening import prompt_inputs
from gazepatch.inspection import read_whole
from gazepatch.layout import Span
from gazepatch.training.chat import Collator
from gazepatch.training.records import read_records

CONFIG = GazeConfig(region=(2, 2, 1), window=None, budget=0.2, periphery=False, min_visual_tokens=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("models") / "reader")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    pixels = torch.randint(0, 255, (112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(base.parent / "page.png")
    lines = []
    for said in ("harbour this is", "what ? harbour harbour is"):
        messages = [{"role": "user", "content": "<image> what ?"}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": messages, "images": ["page.png"]}))
    (base.parent / "data.jsonl").write_text("\n".join(lines))
    return base.parent / "data.jsonl"


@pytest.fixture
def model(base: Path) -> Any:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    return gazepatch.apply(model, CONFIG, context_tokens=torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_scores_are_those_of_forwards_by_hand(model: Any, base: Path, data: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(base)
    tokens = gazepatch.context_tokens_of(model)
    scores = gazepatch.evaluate(model, processor, data, budgets=(1.0, 0.2))
    assert gazepatch.context_tokens_of(model) is tokens
    settings = gazepatch.inspect(model).settings
    assert settings == replace(CONFIG, context_tokens=2)
    gazepatch.restore(model)
    sums, shares = torch.zeros(2, 4), torch.zeros(2)
    count, records = 0, read_records(data)
    for number in range(len(records)):
        batch = Collator(processor)([records[number]])
        labels = batch.pop("labels")[0, 1:]
        wanted = labels >= 0
        dense = model(**batch).logits[0, :-1][wanted]
        count += len(dense)
        for row, budget in enumerate((1.0, 0.2)):
            with gazepatch.patched(model, replace(settings, prefill="gaze", budget=budget), context_tokens=tokens):
                gazed = model(**batch).logits[0, :-1][wanted]
                shares[row] += len(dense) * share_of_steps(model, batch, wanted.nonzero()[:, 0].tolist())
            divergence = torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=dense), torch.distributions.Categorical(logits=gazed)
            )
            same = (gazed.argmax(-1) == dense.argmax(-1)).sum()
            right = [(logits.argmax(-1) == labels[wanted]).sum() for logits in (gazed, dense)]
            sums[row] += torch.stack([same, divergence.sum(), *right])
    found = torch.tensor([[s.agreement, s.divergence, s.accuracy, s.dense_accuracy] for s in scores])
    torch.testing.assert_close(found, sums / count, atol=1e-5, rtol=1e-4)
    assert [s.tokens for s in scores] == [count, count] and scores[0].divergence != scores[1].divergence
    assert [s.read_share for s in scores] == pytest.approx((shares / count).tolist())
    assert scores[0].read_share == 1.0 and 0.19 < (scores[1].read_share or 0) < 0.22


def share_of_steps(model: Any, batch: Any, positions: list[int]) -> float:
    """What the tokens at these positions, the last ones but one, read as decode steps."""
    ids, cache = batch["input_ids"], transformers.DynamicCache()
    model(input_ids=ids[:, : positions[0]], pixel_values=batch["pixel_values"], past_key_values=cache)
    for position in positions:
        model(input_ids=ids[:, position, None], past_key_values=cache)
    assert gazepatch.stats(model).steps == len(positions)
    return gazepatch.stats(model).read_share


def test_what_is_read_where_not_everything_gazes(model: Any, base: Path, data: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(base)
    short = data.read_text().splitlines()[0]
    said = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "this is"}]
    two = json.loads(short) | {"images": ["page.png", "page.png"]}
    two["messages"][0]["content"] = "<image> <image> what ?"
    files = {"words": [{"messages": said}], "one": [json.loads(short)], "two": [two]}
    files["all"] = [one for lines in files.values() for one in lines]
    few = replace(gazepatch.inspect(model).settings, min_visual_tokens=1000)  # more than an image has, less than two
    found = {}
    with gazepatch.patched(gazepatch.restore(model), few, context_tokens=torch.ones(2, 32)):
        for name, lines in files.items():
            (path := data.parent / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
            (found[name],) = gazepatch.evaluate(model, processor, path)
    assert found["words"].read_share is None and found["one"].read_share == 1.0
    share = found["two"].read_share
    assert share is not None and 0.19 < share < 0.22
    assert found["one"].tokens == found["two"].tokens and found["all"].read_share == pytest.approx((1 + share) / 2)
    assert [found[name].read_whole for name in files] == [0, 1, 0, 1]


def test_bench_leaves_the_model_as_it_was(model: Any, base: Path, data: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(base)
    inputs = prompt_inputs(model, processor, [Image.open(data.parent / "page.png")], "what ?")
    settings, tokens = gazepatch.inspect(model).settings, gazepatch.context_tokens_of(model)
    done: list[tuple[int, int]] = []
    timing = gazepatch.bench(model, inputs, new_tokens=3, rounds=2, progress=lambda *at: done.append(at))
    assert gazepatch.inspect(model).settings == settings and gazepatch.context_tokens_of(model) is tokens
    assert done == [(1, 3), (2, 3), (3, 3)] and timing.prompt_tokens == inputs["input_ids"].shape[1]
    gazepatch.restore(model)
    with pytest.raises(PatchError):
        gazepatch.bench(model, inputs)


def test_modules_keep_their_modes_and_the_processor_its_tokens(model: Any, base: Path, data: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(base)
    processor.tokenizer.pad_token = None
    frozen = model.train().get_decoder().layers[0].eval()
    (score,) = gazepatch.evaluate(model, processor, data, budgets=1.0)
    assert model.training and not frozen.training and processor.tokenizer.pad_token is None
    assert score.budget == 1.0 and score.divergence >= 0


def test_refusals(model: Any, base: Path, data: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(base)
    with pytest.raises(ConfigError, match="budget must be"):
        gazepatch.evaluate(model, processor, data, budgets=(0.5, 1.5))
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        gazepatch.evaluate(model, processor, data, limit=0)
    with pytest.raises(ConfigError, match="expected new_tokens >= 2"):
        gazepatch.bench(model, {}, new_tokens=1)
    assert gazepatch.is_patched(model)


def test_logits_that_are_no_numbers_agree_with_nothing(model: Any, base: Path, data: Path) -> None:
    model.get_decoder().norm.weight.data.fill_(float("nan"))
    processor = transformers.AutoProcessor.from_pretrained(base)
    with pytest.raises(ConfigError, match=r"got NaN or infinity from the model dense, in torch\.float32: load it with"):
        gazepatch.evaluate(model, processor, data)
    assert gazepatch.is_patched(model)


def test_rows_with_few_visual_tokens_are_found_by_their_sum() -> None:
    rows = ((0, 0, 5), (2, 1, 4), (0, 7, 12), (1, 0, 9))
    spans = [Span(row, start, stop, None, media=0) for row, start, stop in rows]
    assert read_whole(spans, 10) == {1: 9, 2: 3}
    assert read_whole(spans, 3) == read_whole([], 10) == {}
