"""Models, processors and prompts as the commands take them: names and files in, model and inputs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def open_model(source: str) -> tuple[Any, Any]:
    """A patched model with its processor: an artefact with its own settings, any other model with the defaults."""
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import gazepatch
    from gazepatch.artefact.finding import artefact_folder, base_config, base_of, is_artefact
    from gazepatch.artefact.manifest import read

    transformers.utils.logging.set_verbosity_error()  # hints about settings that nobody here has chosen
    if is_artefact(source):
        model: Any = gazepatch.load(source)
        folder = artefact_folder(source)
        base, revision = base_of(read(folder), folder)
    else:
        base_config(source)  # an unknown architecture is refused before its weights are read
        model = gazepatch.apply(AutoModelForImageTextToText.from_pretrained(source))
        base, revision = source, None
    processor = AutoProcessor.from_pretrained(base, revision=revision)
    return model.to(device()), processor


def device() -> str:
    """Where the commands put a model."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prompt_inputs(model: Any, processor: Any, images: Sequence[Image], prompt: str) -> Any:
    """The model's inputs for one question about images, by its own chat template."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device)
