"""A small LLaVA of transformers' own classes, its tokenizer and its processor, built from a preset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from words import IMAGE, PAD, START, Board

#: A conversation as the model knows it: images and questions up to their `=`, answers up to their full stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %} "
    "{% endfor %}{% endfor %}"
)


@dataclass(frozen=True)
class Preset:
    """Sizes of a model.

    Attributes:
        board: Size of the boards it sees.
        width: Of tower and decoder.
        tower_layers: Layers of the vision tower.
        decoder_layers: Layers of the text decoder.
        heads: Query heads of a layer.
        key_heads: Key heads of a decoder layer.
    """

    board: Board
    width: int
    tower_layers: int
    decoder_layers: int
    heads: int
    key_heads: int


PRESETS = {
    "cpu": Preset(Board(cells=8, cell_tokens=2, patch=8, frames=3), 128, 4, 4, 4, 2),
    "full": Preset(Board(cells=8, cell_tokens=3, patch=8, frames=4), 256, 6, 6, 8, 2),
}


def build(preset: Preset) -> LlavaForConditionalGeneration:
    """A fresh model, initialised so that it learns fast."""
    board, words = preset.board, preset.board.vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=preset.width,
        intermediate_size=4 * preset.width,
        num_hidden_layers=preset.tower_layers,
        num_attention_heads=preset.heads,
        image_size=board.pixels,
        patch_size=board.patch,
        projection_dim=preset.width,
        hidden_act="gelu",
    )
    text = Qwen2Config(
        vocab_size=len(words),
        hidden_size=preset.width,
        intermediate_size=3 * preset.width,
        num_hidden_layers=preset.decoder_layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.5 / math.sqrt(preset.width),
        pad_token_id=words[PAD],
        bos_token_id=words[START],
        eos_token_id=words["."],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words[IMAGE],
        image_seq_length=board.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = words[PAD]
    model.generation_config.bos_token_id = words[START]
    model.generation_config.eos_token_id = words["."]
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
        _init_tower(model.model.vision_tower, board)
        _init_decoder(model.model.language_model)
    return model


def _init_decoder(decoder: nn.Module) -> None:
    """Start with what a lookup needs, which takes long to find by chance.

    In the first layer head `i` copies the token `i + 1` places back, so that the token that answers knows the words of
    the question. In the others every head looks for what is like itself: queries are made by the matrix of their keys.
    """
    config = decoder.config
    for i, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        if i == 0:
            _init_copying(attention, config.rope_parameters["rope_theta"])
        else:
            nn.init.normal_(attention.k_proj.weight, std=config.hidden_size**-0.5)
            keys = attention.k_proj.weight.view(-1, attention.head_dim, config.hidden_size)
            attention.q_proj.weight.copy_(keys.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1))


def _init_copying(attention: nn.Module, theta: float, frequencies: int = 5, strength: float = 4.5) -> None:
    """Biases that agree most, after rotation, at a distance of `i + 1` in head `i`; values pass through unchanged."""
    size, groups = attention.head_dim, attention.num_key_value_groups
    angle = theta ** (-2 * torch.arange(frequencies) / size)
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.normal_(projection.weight, std=0.2 * projection.in_features**-0.5)  # so that place decides, not content
    keys, queries = attention.k_proj.bias.view(-1, size), attention.q_proj.bias.view(-1, size)
    keys[:, :frequencies] = strength
    for i, query in enumerate(queries):
        query[:frequencies] = strength * ((i + 1) * angle).cos()
        query[size // 2 : size // 2 + frequencies] = -strength * ((i + 1) * angle).sin()
    nn.init.orthogonal_(attention.v_proj.weight)
    values = attention.v_proj.weight.view(-1, size, attention.v_proj.in_features)
    attention.o_proj.weight.copy_(values.repeat_interleave(groups, 0).flatten(0, 1).T)


def _init_tower(tower: nn.Module, board: Board) -> None:
    """Stock CLIP starts with positions far weaker than patches, and learns for long where its patches are."""
    inner = getattr(tower, "vision_model", tower)
    width = tower.config.hidden_size
    for layer in inner.encoder.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
    embeddings = inner.embeddings
    fan_in = math.prod(embeddings.patch_embedding.weight.shape[1:])
    nn.init.normal_(embeddings.patch_embedding.weight, std=1.5 / math.sqrt(fan_in))
    embeddings.position_embedding.weight[1:] = positions(board.side, width)


def positions(side: int, width: int) -> Tensor:
    """Position vectors `[side * side, width]` of unit scale: a vector of the row plus one of the column.

    Both are random mixtures of waves from one to many periods over the board, so near patches are alike.
    """
    angle = torch.arange(side)[:, None] * torch.arange(1, side // 2 + 1) * math.pi / side
    waves = torch.cat([angle.sin(), angle.cos()], -1)
    row, column = (waves @ torch.randn(waves.shape[1], width) / math.sqrt(waves.shape[1]) for _ in range(2))
    return (row[:, None] + column[None]).flatten(0, 1)


def make_processor(preset: Preset) -> LlavaProcessor:
    """Tokenizer of single words, and the image processor, in one."""
    board, words = preset.board, preset.board.vocabulary()
    backend = Tokenizer(WordLevel(words, unk_token=PAD))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, words[START])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=START,
        eos_token=".",
        unk_token=PAD,
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size={"height": board.pixels, "width": board.pixels},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=board.patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save(model: LlavaForConditionalGeneration, preset: Preset, folder: Path) -> None:
    """Write weights in bfloat16, tokenizer and processor, for `from_pretrained`."""
    dtype = next(model.parameters()).dtype
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(dtype)
    make_processor(preset).save_pretrained(folder)
