"""The shipped models on a few boards: the same questions, read densely and with gaze, by plain `generate`.

python examples/digits_vlm/ask.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from boards import Asked
from transformers import DynamicCache

MODELS = Path(__file__).parent / "models"


def answers(model: Any, processor: Any, asked: Asked) -> list[str]:
    """What the model writes behind each question; every one sees those before it, with the right answers.

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
            past_key_values=cache,
            max_new_tokens=len(answer.split()),
            do_sample=False,
            **pixels,
        )[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(tokens))
        cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())  # the right answer follows, whatever was said
        text = f"{text} {answer}"
    return said
