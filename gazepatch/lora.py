"""LoRA adapters of a model's text decoder, by way of PEFT: put on, saved, loaded, left out for a while."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from gazepatch.errors import ArtefactError, TrainingError


def missing_peft() -> str:
    """What has to be installed before transformers takes adapters of PEFT; empty where nothing is missing."""
    if find_spec("peft") is None:
        return "the package peft: pip install peft"
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        return (
            f"peft {MIN_PEFT_VERSION} or newer beside transformers {version('transformers')}: pip install -U peft, or "
            "an older transformers where there is none yet"
        )
    return ""


def require_peft() -> None:
    """Raise TrainingError unless there is a PEFT that transformers takes."""
    if missing := missing_peft():
        raise TrainingError(f"LoRA needs {missing}, or train the context tokens alone")


def add_lora(model: Any, decoder: nn.Module, rank: int) -> None:
    """Put adapters on the linear layers of `decoder`, a part of `model`; they alone can be trained then.

    Raises:
        TrainingError: PEFT is not installed, or too old for transformers.
    """
    require_peft()
    from peft import LoraConfig

    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    targets = rf"{re.escape(prefix)}\.layers\..*\.({'|'.join(sorted(leaves))})"
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def has_lora(model: Any) -> bool:
    """Whether a model of transformers carries adapters of PEFT, its own or those of a model of PEFT around it."""
    return bool(_layers(model))


def refuse_prompts(model: Any) -> None:
    """Raise ArtefactError for a model of PEFT with trained prompts, which are no part of the model inside."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ArtefactError(
            "an artefact holds adapters on the model's layers, got a prompt that PEFT trained: save that with the "
            "model's own save_pretrained, and the artefact from model.get_base_model()"
        )


def save_lora(model: Any, folder: Path) -> None:
    """Write the active adapter into a folder of its own.

    Raises:
        ArtefactError: Several adapters are active together, the active one is of a kind that cannot be loaded, or
            PEFT is too old for transformers.
    """
    if missing := missing_peft():
        raise ArtefactError(f"saving LoRA adapters needs {missing}, or merge them with merge_and_unload before")
    active = sorted({name for layer in _layers(model) for name in layer.active_adapters})
    if len(active) > 1:
        raise ArtefactError(
            f"an artefact has one LoRA adapter, got {', '.join(active)}, which are active together: activate one, or "
            "merge them with PEFT's add_weighted_adapter"
        )
    if any(getattr(model.peft_config[name], "use_dora", False) for name in active):
        raise ArtefactError(
            "an artefact holds plain LoRA adapters, got one with DoRA, whose magnitudes transformers does not load: "
            "merge it with merge_and_unload, and save with full=True"
        )
    own = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True  # of adapters that PEFT put on, transformers would save the layers as weights
    try:
        model.save_pretrained(folder)
    finally:
        model._hf_peft_config_loaded = own


def load_lora(model: Any, folder: Path) -> None:
    """Load adapters into their base model from the folder that `save_lora` wrote.

    Raises:
        ArtefactError: PEFT is not installed or too old, or the adapters are damaged, or not all of this model.
    """
    if missing := missing_peft():
        raise ArtefactError(f"{folder} holds LoRA adapters, which need {missing}")
    try:
        found = model.load_adapter(str(folder))
    except Exception as error:  # of PEFT, safetensors and transformers
        raise ArtefactError(
            f"{folder} must hold adapters of PEFT for this model: {' '.join(str(error).split())}; get it again"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := getattr(found, what):  # which transformers only warns of
            raise ArtefactError(
                f"{folder} must fit the model's layers key by key, got {len(keys)} {what.replace('_', ' ')}, among "
                f"them {min(map(str, keys))}; get it again, or load it with the versions that made it"
            )


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """The model without its adapters for the length of a `with` block."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = [layer for layer in [*_layers(model), *copies] if not layer.disable_adapters]
    _enable(layers, False)
    try:
        yield
    finally:
        _enable(layers, True)


def _layers(model: Any) -> list[Any]:
    """The layers that adapters are on."""
    if not getattr(model, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _enable(layers: list[Any], enabled: bool) -> None:
    """Switch adapters, and leave what learns as it was: PEFT changes that too."""
    learns = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(enabled)
    for parameter, learned in learns:
        parameter.requires_grad_(learned)
