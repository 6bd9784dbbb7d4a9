"""Which tokens are the assistant's, with processors that do more to a text than LLaVA's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import SIDE_PX, trained, word_tokenizer, write_image
from tiny import tiny
from tokenizers import normalizers
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)
from transformers.utils import is_torchvision_available

import gazepatch
from gazepatch import GazeConfig, TrainingError
from gazepatch.artefact.manifest import read
from gazepatch.demo.checkpoint import CHAT_TEMPLATE
from gazepatch.training.chat import Collator
from gazepatch.training.conversation import Record
from gazepatch.training.records import read_records
from gazepatch.verification import generate_logits

GAZE = GazeConfig(region=(2, 2, 1), window=None, periphery=False, prefill="gaze", min_visual_tokens=0)
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


# ---- PaliGemma, in which the tokens of a prompt see each other


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "paligemma"
    tiny("paligemma").model.save_pretrained(folder)
    images = SiglipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX})
    images.image_seq_length = 64
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<bos>"
    PaliGemmaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def test_types_of_answers(paligemma: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(paligemma)
    batch = Collator(processor, {"token_type_ids": 1})(conversations(tmp_path, 1, 2))
    assert said(processor, batch) == [" ".join(SAID)] * 2
    for types, labels, real in zip(batch["token_type_ids"], batch["labels"], batch["attention_mask"], strict=True):
        first = (labels != -100).nonzero()[0].item()
        assert real[first:].all() and types.tolist() == [0] * first + [1] * (len(types) - first)


def test_conversations_that_the_processor_refuses(paligemma: Path, tmp_path: Path) -> None:
    (record,) = conversations(tmp_path, 0)
    with pytest.raises(
        TrainingError, match=r"talk.json, record 1: the processor refuses this .* `images` are expected"
    ):
        Collator(AutoProcessor.from_pretrained(paligemma))([record])


@torch.no_grad()
def decoded(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The right tokens `[N]` of the only answer in a batch, and the logits `[N, V]` of decode steps along it."""
    wanted = (batch["labels"][0] != -100).nonzero()[:, 0]
    tokens, prompt = batch["input_ids"][:, wanted], int(wanted[0])
    inputs = {name: batch[name][:, :prompt] for name in ("input_ids", "attention_mask", "token_type_ids")}
    logits, _ = generate_logits(model, {**inputs, "pixel_values": batch["pixel_values"]}, len(wanted) - 1, tokens)
    return tokens[0], logits[0]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """A conversation with one answer."""
    write_image(tmp_path / "0.png", 0)
    turns = [("user", "<image> w8 w9"), ("assistant", "w20 w21 w22 w23 w24 w25")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "talk.json").write_text(json.dumps([{"messages": messages, "images": ["0.png"]}]))
    return tmp_path / "talk.json"


def test_scores_are_those_of_decode_steps(paligemma: Path, talk: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(paligemma), AutoProcessor.from_pretrained(paligemma)
    batch = Collator(processor)([read_records(talk)[0]])
    tokens, dense = decoded(model, batch)
    context = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with gazepatch.patched(model, GAZE, context_tokens=context):
        scores = gazepatch.evaluate(model, processor, talk, budgets=(1.0, 0.2))
    for score in scores:
        with gazepatch.patched(model, replace(GAZE, budget=score.budget), context_tokens=context):
            _, gazed = decoded(model, batch)
        divergence = kl_div(gazed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
        assert score.divergence == pytest.approx(divergence.item(), rel=1e-3)
        assert score.dense_accuracy == (dense.argmax(-1) == tokens).float().mean().item()


def test_the_loss_is_that_of_decode_steps(paligemma: Path, talk: Path, tmp_path: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(paligemma), AutoProcessor.from_pretrained(paligemma)
    tokens, logits = decoded(model, Collator(processor)([read_records(talk)[0]]))
    config = replace(GAZE, budget=1.0)
    out = trained(paligemma, talk, tmp_path / "out", config, objective="next-token", trainable="full", steps=1)
    assert (read(out).provenance or {})["final_loss"] == pytest.approx(cross_entropy(logits, tokens).item(), rel=1e-3)
