"""A tiny LLaVA with a processor, and conversations about pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from talking import SIDE_PX, word_tokenizer, write_image
from tiny import tiny
from transformers import CLIPImageProcessorPil, LlavaProcessor

from gazepatch.demo.checkpoint import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with a processor, whose words are w8, w9, ..."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny("llava").model.save_pretrained(folder)
    size = {"height": SIDE_PX, "width": SIDE_PX}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        images,
        word_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations about pictures of noise, of one and of two turns."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(8, 900, (count,), generator=generator).tolist())

    lines = []
    for number in range(8):
        write_image(folder / f"{number}.png", number)
        turns = [("user", f"<image> {words(3)}"), ("assistant", words(8))]
        turns += [("user", words(2)), ("assistant", words(5))] * (number % 2)
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}))
    path = folder / "talk.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def processor(base: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="session")
def on_two_processes() -> Callable[..., str]:
    """A function that runs a program with these arguments on two processes to its end, and returns what they print."""

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
