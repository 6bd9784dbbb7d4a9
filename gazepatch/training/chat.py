"""Records as a model reads them: rendered by the processor's chat template, with the assistant's tokens as labels.

Which tokens are the assistant's is found by rendering what comes before each of its messages: that works with every
template that only ever appends, whether it marks the assistant's part or not.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from gazepatch.errors import TrainingError
from gazepatch.processors import lack_of
from gazepatch.training.conversation import Record
from gazepatch.training.images import open_image

#: What a loss leaves out, as everywhere in transformers.
IGNORED = -100


@dataclass(frozen=True)
class Rendered:
    """A record as text: `answers` are the half-open ranges of characters that the assistant wrote."""

    record: Record
    text: str
    answers: list[tuple[int, int]]


class Collator:
    """Makes batches of records, for one processor.

    Args:
        processor: The model's.
        of_answers: What goes along with the tokens of an answer, by the name of the input: the `inputs_of_answers` of
            the model's adapter.

    Raises:
        TrainingError: It does not take images and conversations, or has no chat template.
    """

    def __init__(self, processor: Any, of_answers: Mapping[str, int] = {}) -> None:
        if lack := lack_of(processor):
            raise TrainingError(lack)
        if processor.tokenizer.pad_token is None:
            processor = copy.deepcopy(processor)  # the given one stays as it is
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        self.processor, self.tokenizer, self.of_answers = processor, processor.tokenizer, of_answers

    def __call__(self, records: Sequence[Record]) -> dict[str, Any]:
        """The model's inputs for some records, padded on the left, and `labels` `[B, S]`.

        Raises:
            TrainingError: The template or the processor refuses one, or the tokens of an answer cannot be found.
        """
        rendered = [self.rendered(record) for record in records]
        images = [[open_image(one, r.folder, r.where) for one in r.images] for r in records]
        where = "; ".join(record.where for record in records)
        batch = dict(self._processed([one.text for one in rendered], images, where))
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (one, pictures) in enumerate(zip(rendered, images, strict=True)):
            real = batch["attention_mask"][row].nonzero()[:, 0]
            ids = batch["input_ids"][row, real]
            ranges = self._token_ranges(one, ids.tolist(), pictures)
            for start, stop in ranges:
                labels[row, real[start:stop]] = ids[start:stop]
            # As in a decode step from the first answer on, or tokens would see those that they are to predict.
            for name in self.of_answers.keys() & batch.keys():
                batch[name][row, real[ranges[0][0] :]] = self.of_answers[name]
        return {**batch, "labels": labels}

    def rendered(self, record: Record) -> Rendered:
        """A record as text.

        Raises:
            TrainingError: The template fails, or changes earlier messages, so that answers cannot be found.
        """
        text = self._template(record, len(record.messages))
        answers = []
        for number, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            asked = self._template(record, number)
            prompt = self._template(record, number, prompt=True)
            stop = len(text[: _common(self._template(record, number + 1), text)].rstrip())
            said = "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
            # Templates may end a prompt with more than they write before a given answer.
            start = len(prompt) if text.startswith(prompt) else self._content_start(record, number, text)
            # Not from `start` on: a prompt may hold the beginning of an answer, as where it opens a thought.
            found = text.rfind(said, len(asked), stop)
            if not text.startswith(asked) or start < len(asked) or found < 0 or found + len(said) <= start:
                raise TrainingError(
                    f"{record.where}: the chat template does not keep message {number} as it stands, so the "
                    "assistant's tokens cannot be found: train with a template that only appends"
                )
            answers.append((start, stop))
        return Rendered(record, text, answers)

    def _content_start(self, record: Record, number: int, text: str) -> int:
        """Where the content of a message begins in the text: where other content in its place makes a difference."""
        common = []
        for content in ("0", "1"):  # of which the message begins with one at most
            messages = list(record.messages)
            messages[number] = {**messages[number], "content": [{"type": "text", "text": content}]}
            common.append(_common(self._template(replace(record, messages=messages), len(messages)), text))
        return min(common)

    def _template(self, record: Record, messages: int, prompt: bool = False) -> str:
        """The text of the first messages, and with `prompt` what an answer follows."""
        if not messages and not prompt:
            return ""
        try:
            text = self.processor.apply_chat_template(
                record.messages[:messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise what they like
            raise TrainingError(
                f"{record.where}: the chat template refuses this conversation: {' '.join(str(error).split())}"
            ) from error
        return str(text)

    def _processed(self, texts: list[str], images: list[list[Image]], where: str) -> Any:
        bos = self.tokenizer.bos_token
        special = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        try:
            return self.processor(
                text=texts,
                images=images if any(images) else None,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                **special,
            )
        except Exception as error:  # processors raise what they like
            raise TrainingError(
                f"{where}: the processor refuses this conversation: {' '.join(str(error).split())}"
            ) from error

    def _token_ranges(self, one: Rendered, ids: list[int], pictures: list[Image]) -> list[tuple[int, int]]:
        """Half-open ranges of tokens for the answers of a record with these token ids.

        Raises:
            TrainingError: An answer has no tokens, or other ones than without images.
        """
        plain = self._plain(one.text)
        ranges = []
        for answer in one.answers:
            start, stop = (_common(plain, self._plain(self._cut(one.text, end))) for end in answer)
            shift = len(ids) - len(plain)
            if ids[start + shift :] != plain[start:]:  # more images behind it, or the processor adds a last token
                cut = self._processed([self._cut(one.text, answer[0])], [pictures], one.record.where)["input_ids"]
                shift = _common(ids, cut[0].tolist()) - start
            start, stop, said = start + shift, stop + shift, plain[start:stop]
            if not said or ids[start:stop] != said:
                raise TrainingError(
                    f"{one.record.where}: expected the tokens of the answer {one.text[slice(*answer)][:40]!r}, got "
                    f"{self.tokenizer.decode(ids[start:stop])[:40]!r}: {type(self.processor).__name__} must give an "
                    "answer at least one token, and with images the same ones as without; leave this record out"
                )
            ranges.append((start, stop))
        return ranges

    def _plain(self, text: str) -> list[int]:
        """Tokens of a text where placeholders of images stay as they are."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _cut(self, text: str, end: int) -> str:
        """The text with a token put in: those before it are as many as without, whatever images are behind it.

        A beginning of the text would not do: how many tokens an image takes may depend on how many images there are.
        """
        between = next(one for one in (self.tokenizer.eos_token, "0", "1") if one and not text.startswith(one, end))
        return text[:end] + between + text[end:]


def supervised(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where a model's logits are needed.

    Args:
        labels: `[B, S]`, `IGNORED` but for the assistant's tokens.

    Returns:
        Columns `[C]` of the logits that are needed in any row; `[B, C]` which rows need them; the right tokens `[N]`,
        row by row.
    """
    following = labels[:, 1:]
    wanted = following != IGNORED
    columns = wanted.any(0).nonzero()[:, 0]
    kept = wanted[:, columns]
    return columns, kept, following[:, columns][kept]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of what both begin with."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
