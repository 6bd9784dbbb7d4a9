"""The shipped models on a few boards: the same questions, read densely and with gaze, by plain `generate`.

python examples/digits_vlm/ask.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from boards import Asked, load
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import gazepatch
from gazepatch.caches.name import CACHE

MODELS = Path(__file__).parent / "models"

INTRODUCTION = """\
A board has 8 x 8 coloured digits: r2 c5 is row 2, column 5, counted from 0. "most" asks for the colour of most digits,
"more" which of two colours has more, "frame magenta" for a digit of the board with a magenta background. Each line is a
question with its right answer. A wrong answer follows it, named after its model: dense reads everything, gaze little.
"""


def answers(model: Any, processor: Any, asked: Asked) -> list[str]:
    """What the model writes after each question; every one sees those before it, with the right answers.

    All turns share one cache, so the images are encoded and read once.
    """
    cache, text = DynamicCache(), processor.image_token * len(asked.images)
    images: list[Any] | None = asked.open()
    said = []
    for _, question, answer in asked.turns:
        text = f"{text} {question}"
        inputs = processor(text=[text], images=images, return_tensors="pt")
        pixels = {} if cache.get_seq_length() else {"pixel_values": inputs["pixel_values"]}
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **{CACHE: cache},
            max_new_tokens=len(answer.split()),
            do_sample=False,
            **pixels,
        )[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(tokens))
        cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())  # the right answer follows, whatever was said
        text = f"{text} {answer}"
    return said


def main() -> None:
    """Ask both models everything that is shipped, and print what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS)
    args = parser.parse_args()
    dense: Any = AutoModelForImageTextToText.from_pretrained(args.models / "dense", dtype=torch.float32)
    gaze: Any = gazepatch.load(args.models / "gaze", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(args.models / "dense")
    tally = {"dense": 0, "gaze": 0}
    shares = []
    questions = 0
    print(INTRODUCTION)
    for asked in load():
        print(", ".join(asked.images))
        whole, gazed = answers(dense, processor, asked), answers(gaze, processor, asked)
        shares.append(gazepatch.stats(gaze).read_share)
        for (_, question, answer), by_dense, by_gaze in zip(asked.turns, whole, gazed, strict=True):
            tally["dense"] += by_dense == answer
            tally["gaze"] += by_gaze == answer
            questions += 1
            wrong = "".join(
                f"   {name} says: {text}" for name, text in (("dense", by_dense), ("gaze", by_gaze)) if text != answer
            )
            print(f"   {question:26s} {answer}{wrong}")
    read = 100 * sum(shares) / len(shares)
    print(f"\n{questions} questions. Trained and read densely: {tally['dense']} right.")
    print(
        f"Trained with gaze, reading {read:.1f} % of the boards and 4 context tokens for each: {tally['gaze']} right."
    )


if __name__ == "__main__":
    main()
