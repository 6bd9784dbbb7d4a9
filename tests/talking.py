"""Trainings of a tiny LLaVA on talk about noise: settings, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gazepatch
from gazepatch import GazeConfig
from gazepatch.patch import dense
from gazepatch.training.chat import Collator, supervised
from gazepatch.training.objectives import agreed
from gazepatch.training.records import read_records

SIDE_PX = 32  # 8 x 8 visual tokens
SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "user": 5, "assistant": 6, "\n": 7}
CONFIG = GazeConfig.paper(region=(2, 2, 1), context_tokens=2)
QUICK: dict[str, Any] = {"steps": 6, "batch_size": 2, "save_every": 2, "log_every": 2, "learning_rate": 0.05}
TURNS = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are w8, w9, ..."""
    words = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), VOCAB) if i != IMAGE} | {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    return fast


def write_image(path: Path, seed: int) -> Path:
    noise = torch.randint(0, 256, (SIDE_PX, SIDE_PX, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    return path


def trained(base: Path, data: Path, out: Path, config: GazeConfig = CONFIG, **settings: Any) -> Path:
    return gazepatch.train(base, data, out, config=config, progress=False, **{**QUICK, **settings})


def tokens_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "context_tokens.safetensors")["context_tokens"]


@torch.no_grad()
def agreement(model: Any, processor: Any, data: Path, teacher: Any = None) -> float:
    """Share of next tokens along the answers that are those of the same model read densely, or of another one."""
    collator, records = Collator(processor), read_records(data)
    batch = collator([records[number] for number in range(len(records))])
    columns, kept, tokens = supervised(batch.pop("labels"))
    student = model(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    if teacher is None:
        with dense(model):
            expected = model(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    else:
        expected = teacher(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    return int(agreed(student, expected)) / len(tokens)


def arguments(settings: Mapping[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
