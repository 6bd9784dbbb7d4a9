"""The demo's stand-in reads without error, and gaze on a real pretrained decoder stays close to dense, untrained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_reader import write_reader

import gazepatch
from gazepatch import ArtefactError, GazeError
from gazepatch.answering import Answer
from gazepatch.demo.checkpoint import SIDE, build, missing_packages
from gazepatch.demo.glyphs import GLYPH_PX, bits, print_page
from gazepatch.demo.page import PAGE, QUESTIONS
from gazepatch.demo.reading import Reader, prompt
from gazepatch.demo.run import WAYS, run

ASKED = QUESTIONS[:4]
# Next tokens on which gaze and dense agree along the dense answers, as measured on these questions.
MEASURED = {"25%": 52 / 52, "25% in squares": 48 / 52}
MARGIN = 0.05

needs_packages = pytest.mark.skipif(bool(missing_packages()), reason=f"needs {', '.join(missing_packages())}")


def test_glyphs() -> None:
    assert bits(0b1011) == [1, 1, 0, 1] + [0] * 12
    page = print_page([0b1011, 2**16 - 1], side=2, blank=1)
    assert page.size == (2 * GLYPH_PX, 2 * GLYPH_PX)
    white = {(x, y) for x in range(8) for y in range(8) if page.getpixel((x, y)) == (255, 255, 255)}
    second = {(x, y) for x in range(4, 8) for y in range(4)}
    assert white == {(0, 0), (1, 0), (3, 0)} | second | {(0, 4), (4, 4)}
    for wrong in (-1, 2**16):
        with pytest.raises(GazeError, match="token id below 65536"):
            bits(wrong)
    with pytest.raises(GazeError, match="room for 4 tokens, got 5"):
        print_page([0] * 5, side=2, blank=0)


def test_the_tower_reads_without_error(tmp_path: Path) -> None:
    folder = write_reader(tmp_path / "reader")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(model) is transformers.LlavaForConditionalGeneration
    tokens = [i % model.config.text_config.vocab_size for i in range(SIDE * SIDE)]
    pixels = processor.image_processor(print_page(tokens, SIDE, 0), return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(features, model.get_input_embeddings().weight[tokens], rtol=1e-5, atol=1e-7)


def test_page_and_questions() -> None:
    assert len(PAGE.split()) >= 500
    assert len(QUESTIONS) >= 5
    assert all(fact in PAGE for _, fact in QUESTIONS)


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown: list[str] = []
    for folder in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(ArtefactError, match=r"file.* cannot be written: .*; choose another place"):
            run(shown.append, folder)
    assert shown == []


# ---- with the real language model


@dataclass
class Dense:
    """The real model, unpatched, and its answers to a few questions."""

    model: Any
    processor: Any
    answers: dict[str, Answer]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder = tmp_path_factory.mktemp("demo")
    build(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    reader = Reader(model, processor)
    return Dense(model, processor, {question: reader.ask(question) for question, _ in ASKED})


@needs_packages
def test_dense_answers_are_right(dense: Dense) -> None:
    assert [question for question, fact in ASKED if fact not in dense.answers[question].text] == []


@needs_packages
def test_the_page_becomes_the_embeddings_of_its_words(dense: Dense) -> None:
    encode = dense.processor.tokenizer.encode
    page = encode(PAGE, add_special_tokens=False)
    page += encode("\n", add_special_tokens=False) * (SIDE * SIDE - len(page))
    pixels = prompt(dense.processor, QUESTIONS[0][0])["pixel_values"]
    with torch.no_grad():
        features = dense.model.model.get_image_features(pixel_values=pixels).pooler_output[0]
    torch.testing.assert_close(features, dense.model.get_input_embeddings().weight[page], rtol=1e-5, atol=1e-6)


@needs_packages
@pytest.mark.parametrize(("way", "measured"), MEASURED.items(), ids=MEASURED)
def test_untrained_fidelity(dense: Dense, way: str, measured: float) -> None:
    agreed = followed = 0
    with gazepatch.patched(dense.model, WAYS[way]):
        reader = Reader(dense.model, dense.processor)
        for question, given in dense.answers.items():
            choices = reader.follow(question, given.tokens)
            agreed += sum(a == b for a, b in zip(choices, given.tokens[1:], strict=True))
            followed += len(choices)
        share = gazepatch.stats(dense.model).read_share
    assert 0.2 < share < 0.3
    assert agreed / followed >= measured - MARGIN
