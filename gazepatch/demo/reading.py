"""Asks the demo's model about its page: read once, then one question after the other on the same cache."""

from __future__ import annotations

from typing import Any

import torch

from gazepatch.answering import Answer, answer
from gazepatch.caches.name import CACHE
from gazepatch.demo.checkpoint import SIDE
from gazepatch.demo.glyphs import print_page
from gazepatch.demo.page import PAGE

MAX_NEW_TOKENS = 32
_TASK = "Read this page, then answer a question.\n\n"


class Reader:
    """A model that has read the page.

    Args:
        model: Patched or not; it must stay so.
        processor: The model's.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        inputs = prompt(processor, "?")
        # Up to the end of the image nothing depends on the question.
        images = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()
        self.page_tokens = int(images[-1]) + 1
        page = {name: value[:, : self.page_tokens] for name, value in inputs.items() if name != "pixel_values"}
        with torch.no_grad():
            out = model(**page, pixel_values=inputs["pixel_values"], use_cache=True, logits_to_keep=1)
        self.cache = out[CACHE]

    def ask(self, question: str) -> Answer:
        """The answer to one question, as if it were the first."""
        self._forget()
        inputs = {name: value for name, value in prompt(self.processor, question).items() if name != "pixel_values"}
        return answer(
            self.model,
            self.processor.tokenizer,
            inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            **{CACHE: self.cache},
        )

    def follow(self, question: str, tokens: list[int]) -> list[int]:
        """The model's own choice for each token of an answer when it is given the true ones before it.

        The first choice is left out: it comes from the prompt, which never gazes under these settings.
        """
        self._forget()
        ids = prompt(self.processor, question)["input_ids"][:, self.page_tokens :]
        choices, given = [], {CACHE: self.cache}
        with torch.no_grad():
            self.model(input_ids=ids, use_cache=True, **given)
            for token in tokens[:-1]:
                step = self.model(input_ids=torch.tensor([[token]]), use_cache=True, **given)
                choices.append(int(step.logits[0, -1].argmax()))
        return choices

    def _forget(self) -> None:
        """Take the cache back to the end of the page."""
        if extra := self.cache.get_seq_length() - self.page_tokens:
            self.cache.crop(-extra)


def prompt(processor: Any, question: str) -> dict[str, Any]:
    """The model's inputs for the page and one question."""
    encode = processor.tokenizer.encode
    (blank,) = encode("\n", add_special_tokens=False)
    page = print_page(encode(PAGE, add_special_tokens=False), SIDE, blank)
    content = [
        {"type": "text", "text": _TASK},
        {"type": "image", "image": page},
        {"type": "text", "text": "\n\n" + question},
    ]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )
