"""Which tokens are the assistant's, with processors that do more to a text than LLaVA's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import SIDE_PX, word_tokenizer, write_image
from tokenizers import normalizers
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor
from transformers.utils import is_torchvision_available

from gazepatch import TrainingError
from gazepatch.demo.checkpoint import CHAT_TEMPLATE
from gazepatch.training.chat import Collator
from gazepatch.training.records import Record, read_records

ANSWERS = ["w20 w21", "w22", "w20 w24 w25"]
SAID = [f"{answer} <|im_end|>" for answer in ANSWERS]


class OneVision(LlavaOnevisionProcessor):
    """Does without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is not None or is_torchvision_available():
            return super().check_argument_for_proper_class(argument_name, argument)


def one_vision() -> Any:
    """Cuts an image into tiles if it is the only one of its conversation."""
    tiles = [[SIDE_PX, 2 * SIDE_PX], [2 * SIDE_PX, SIDE_PX], [2 * SIDE_PX, 2 * SIDE_PX]]
    images = LlavaOnevisionImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}, image_grid_pinpoints=tiles)
    return OneVision(
        images,
        word_tokenizer(),
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def conversations(folder: Path, *images: int) -> list[Record]:
    """One for each of `images`, which says how many the first questions have; all questions have the same answers."""
    lines = []
    for number in range(3):
        write_image(folder / f"{number}.png", number)
    for count in images:
        messages = []
        for number, answer in enumerate(ANSWERS):
            question = "<image> w8" if number < count else "w8"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append({"messages": messages, "images": [f"{number}.png" for number in range(count)]})
    (folder / "talk.json").write_text(json.dumps(lines))
    records = read_records(folder / "talk.json")
    return [records[number] for number in range(len(records))]


def said(processor: Any, batch: Any) -> list[str]:
    """The text that each row is trained on."""
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_images_that_take_fewer_tokens_beside_others(tmp_path: Path) -> None:
    processor, records = one_vision(), conversations(tmp_path, 0, 1, 2, 3)
    for some in (*([one] for one in records), records[1:]):
        batch = Collator(processor)(some)
        assert said(processor, batch) == [" ".join(SAID)] * len(some)
        labels, ids = batch["labels"], batch["input_ids"]
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    counts = (ids == processor.image_token_id).sum(1).tolist()
    assert counts[0] > counts[1] and 2 * counts[2] == 3 * counts[1], "this is no test if images do not differ"


def test_tokens_that_merge_before_an_image(tmp_path: Path) -> None:
    processor, (record,) = one_vision(), conversations(tmp_path, 2)
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_start|>{{ message.role }}\n", "{{ message.role }}\nw8")
    processor.chat_template = processor.chat_template.replace("<|im_start|>assistant\n", "assistant\nw8")
    for message in record.messages[1::2]:
        message["content"][0]["text"] = "01 w20"  # makes the token w801
    assert said(processor, Collator(processor)([record])) == [" ".join(["w801 w20 <|im_end|>"] * 3)]


def test_answers_without_tokens_are_refused(processor: Any, tmp_path: Path) -> None:
    (record,) = conversations(tmp_path, 1)
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("w22", "")
    with pytest.raises(TrainingError, match=r"talk.json, record 1: expected the tokens of the answer 'w22', got ''"):
        Collator(processor)([record])


def test_answers_that_read_otherwise_with_images_are_refused(tmp_path: Path) -> None:
    class Forgetful(OneVision):
        def __call__(self, images: Any = None, text: Any = None, **settings: Any) -> Any:
            return super().__call__(images=images, text=[one.replace("w22", "w23") for one in text], **settings)

    processor, (record,) = one_vision(), conversations(tmp_path, 3)
    processor.__class__ = Forgetful
    with pytest.raises(TrainingError, match=r"answer 'w22<\|im_end\|>', got 'w23 <\|im_end\|>': Forgetful must give"):
        Collator(processor)([record])
