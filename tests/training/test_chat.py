"""Records as a model reads them: which tokens are the assistant's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from talking import TURNS, trained, write_image

from gazepatch import TrainingError
from gazepatch.demo.checkpoint import CHAT_TEMPLATE
from gazepatch.training.chat import Collator, supervised
from gazepatch.training.records import read_records


def labelled(processor: Any, folder: Path, *records: Mapping[str, Any]) -> list[str]:
    """The text that each record is trained on."""
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_records(path)
    batch = Collator(processor)([read[number] for number in range(len(read))])
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_are_what_the_assistant_says(processor: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    write_image(tmp_path / "b.png", 1)
    short = {"messages": TURNS, "images": ["a.png"]}
    turns = ["<image> w8", "w20 w21", "w10 <image> w11", "w22", "w12", "w23 w24 w25"]
    long = {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)],
        "images": ["a.png", "b.png"],
    }
    first, second = labelled(processor, tmp_path, short, long)
    assert first == "w9 <|im_end|>"
    assert second == "w20 w21 <|im_end|> w22 <|im_end|> w23 w24 w25 <|im_end|>"


def test_labels_with_a_generation_prompt_that_is_longer_than_history(processor: Any, tmp_path: Path) -> None:
    processor.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\nw900 \n{% endif %}")
    assert labelled(processor, tmp_path, {"messages": TURNS}) == ["w9 <|im_end|>"]


def answers(processor: Any, folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The answers as the template writes them."""
    (folder / "one.json").write_text(json.dumps([record]))
    rendered = Collator(processor).rendered(read_records(folder / "one.json")[0])
    return [rendered.text[start:stop] for start, stop in rendered.answers]


def test_answers_that_begin_in_the_prompt(processor: Any, tmp_path: Path) -> None:
    processor.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    thought = "<think>\nw9\n</think>\n\nw10"
    turns = [{"role": "user", "content": f"{thought} w8"}, {"role": "assistant", "content": thought}]
    said = "w9\n</think>\n\nw10<|im_end|>"  # what a model has to say behind the prompt
    assert answers(processor, tmp_path, {"messages": turns}) == [said]
    assert answers(processor, tmp_path, {"messages": [*turns, *TURNS, *turns]}) == [said, "w9<|im_end|>", said]


@pytest.mark.parametrize("said", ["<", "a", "0", "1", "<|", "<t", "assistant"])
def test_answers_that_are_like_what_is_around_them(said: str, processor: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    for opening in ("", "<think>\n", f"{said}x"):
        processor.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{opening}{{% endif %}}")
        assert answers(processor, tmp_path, {"messages": turns * 2}) == [f"{said}<|im_end|>"] * 2


def test_labels_where_tokens_merge_over_the_cut(processor: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    opening = "<|im_start|>{{ message.role }}\nw8"  # and an answer 01 make the token w801
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_start|>{{ message.role }}\n", opening)
    processor.chat_template = processor.chat_template.replace("assistant\n", "assistant\nw8")
    turns = [{"role": "user", "content": " w9"}, {"role": "assistant", "content": "01 w20"}]
    for record in ({"messages": turns}, {"messages": turns * 2, "images": ["a.png"]}):
        expected = " ".join(["w801 w20 <|im_end|>"] * (len(record["messages"]) // 2))
        assert labelled(processor, tmp_path, record) == [expected]


def test_templates_that_do_not_do(processor: Any, base: Path, tmp_path: Path) -> None:
    template = "{% if messages|length > 2 %}{{ messages[-1].role }}{% else %}" + CHAT_TEMPLATE + "{% endif %}"
    processor.chat_template = template
    with pytest.raises(TrainingError, match="line 1: the chat template does not keep message 1"):
        labelled(processor, tmp_path, {"messages": TURNS * 2})
    processor.chat_template = CHAT_TEMPLATE.replace("{{ part.text }}", "")
    with pytest.raises(TrainingError, match="does not keep message 1"):
        labelled(processor, tmp_path, {"messages": TURNS})
    with pytest.raises(TrainingError, match="does not keep message 1"):  # though the template itself says the same
        labelled(processor, tmp_path, {"messages": [TURNS[0], {"role": "assistant", "content": "assistant"}]})
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TrainingError, match="line 1: the chat template refuses this conversation: roles must"):
        labelled(processor, tmp_path, {"messages": TURNS})
    processor.chat_template = None
    with pytest.raises(TrainingError, match="no chat template"):
        Collator(processor)
    with pytest.raises(TrainingError, match="a processor for images and text, got "):
        Collator(processor.tokenizer)


@pytest.mark.parametrize("form", ["talk.jsonl", "talk.json"])
def test_a_record_that_the_template_refuses_stops_the_training_before_it_starts(
    form: str, base: Path, tmp_path: Path
) -> None:
    strict = Path(shutil.copytree(base, tmp_path / "strict"))
    loop, wrong = "{% for message in messages %}", "loop.index0 % 2 != (message.role == 'assistant')"
    refusing = f"{loop}{{% if {wrong} %}}{{{{ raise_exception('roles must alternate') }}}}{{% endif %}}"
    (strict / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(loop, refusing))
    records = [json.dumps({"messages": messages}) for messages in (TURNS, TURNS * 2, [TURNS[0], *TURNS])]
    (tmp_path / form).write_text("\n".join(records) if form == "talk.jsonl" else f"[{','.join(records)}]")
    with pytest.raises(TrainingError, match=rf"{form}, \w+ 3: the chat template refuses .* roles must alternate"):
        trained(strict, tmp_path / form, tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


def test_templates_that_look_at_the_first_part_of_a_message(processor: Any, tmp_path: Path) -> None:
    of_part = "{% if message.content[0].type == 'text' %}: {% endif %}{% for part in message.content %}"
    processor.chat_template = CHAT_TEMPLATE.replace("{% for part in message.content %}", of_part)
    silent = {"role": "user", "content": ""}
    assert answers(processor, tmp_path, {"messages": [silent, TURNS[1]] * 2}) == [": w9<|im_end|>"] * 2


def test_an_image_that_is_damaged_names_its_line(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.dds")
    whole = (tmp_path / "b.dds").read_bytes()
    (tmp_path / "b.dds").write_bytes(whole[:80] + b"\3\0\0\0" + whole[84:])  # flags that no pixels have
    for name in ("a.png", "b.dds"):
        with pytest.raises(TrainingError, match=r"some.jsonl, line 1: an image cannot be read"):
            labelled(processor, tmp_path, {"messages": TURNS, "images": [name]})


def test_supervised_positions() -> None:
    none = -100
    columns, kept, tokens = supervised(torch.tensor([[none, none, 7, 8], [none, none, none, 9]]))
    assert (columns.tolist(), kept.tolist(), tokens.tolist()) == ([1, 2], [[True, True], [False, True]], [7, 8, 9])
