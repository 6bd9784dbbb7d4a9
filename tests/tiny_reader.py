"""A tiny checkpoint with a processor, offline: the demo's LLaVA around a random language model of two layers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gazepatch.demo.checkpoint import assemble

WORDS = [
    "<unk>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "user",
    "assistant",
    "\n",
    "what",
    "is",
    "this",
    "?",
    "harbour",
]


def write_reader(folder: Path) -> Path:
    """Save it to `folder`. It answers nonsense, but always the same nonsense."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,  # with tied ones a random model repeats its last token
    )
    words = LlamaForCausalLM(config)
    words.generation_config.eos_token_id = None  # always as many tokens as were asked for
    assemble(words, fast, folder)
    return folder
