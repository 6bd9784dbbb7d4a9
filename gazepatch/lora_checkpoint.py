"""The checkpoint of an adapter: what PEFT put on a model, written into a folder of its own and read back.

Written under PEFT's own keys. Those keys lead to the same parameters when they are read, one by one: transformers would
rename them as it renames those of old checkpoints, and leaves out what was trained beside the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gazepatch.errors import ArtefactError
from gazepatch.lora import NAME, adapter_layers, adapter_weights, missing_peft, put_on

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT calls the model inside


def refuse_prompts(model: Any) -> None:
    """Raise ArtefactError for a model of PEFT with trained prompts, which are no part of the model inside."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ArtefactError(
            "an artefact holds adapters on the model's layers, got a prompt that PEFT trained: save that with the "
            "model's own save_pretrained, and the artefact from model.get_base_model()"
        )


def save_lora(model: Any, folder: Path) -> None:
    """Write the active adapter, and what PEFT trained with it, into a folder of its own.

    Raises:
        ArtefactError: Several adapters are active together, or none; the active one could not be read back, or PEFT is
            too old.
    """
    if missing := missing_peft():
        raise ArtefactError(f"saving LoRA adapters needs {missing}, or merge them with merge_and_unload before")
    active = sorted({name for layer in adapter_layers(model) for name in layer.active_adapters})
    if len(active) != 1:
        raise ArtefactError(
            f"an artefact has one LoRA adapter, got {', '.join(active) or 'none'} active together: activate one, or "
            "merge them with PEFT's add_weighted_adapter"
        )
    config = model.peft_config[active[0]]
    _refuse_kind(config)
    # Copies: tied parameters share their memory, which safetensors does not store.
    copies = {
        PREFIX + key: held.detach().to("cpu", copy=True).contiguous()
        for key, held in adapter_weights(model, active[0]).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(copies, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_lora(model: Any, folder: Path) -> None:
    """Put the adapter on its base model that `save_lora` wrote; nothing of the model can be trained then.

    Raises:
        ArtefactError: PEFT is not installed or too old, or the adapter is damaged, or not all of this model, or for
            layers of it that are offloaded.
    """
    if missing := missing_peft():
        raise ArtefactError(f"{folder} holds LoRA adapters, which need {missing}")
    from peft import PeftConfig
    from peft.functional import cast_adapter_dtype

    try:
        config = PeftConfig.from_pretrained(str(folder.absolute()))  # others may be taken for ids of the Hub
        config.inference_mode = True
        found = load_file(folder / WEIGHTS_NAME)
        put_on(model, config)
    except Exception as error:  # of PEFT, safetensors and torch
        raise ArtefactError(
            f"{folder} must hold adapters of PEFT for this model: {' '.join(str(error).split())}; get a new copy, or "
            "load it with the versions that made it"
        ) from error
    # PEFT made them of their layers' dtype, and trains them in single precision beside layers of fewer bits.
    cast_adapter_dtype(model, NAME, any(tensor.dtype == torch.float32 for tensor in found.values()))
    expected = {PREFIX + key: held for key, held in adapter_weights(model, NAME).items()}
    _compare(folder, expected, found)
    with torch.no_grad():
        for key, held in expected.items():
            held.copy_(found[key])
    model.requires_grad_(False)


def _refuse_kind(config: Any) -> None:
    """Refuse kinds of adapters that have more to them than what stands under their keys."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    # AdaLoRA drops ranks as it trains; others share tensors between layers, outside of the model.
    shared = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "uses_shared_state", False)
    if config.peft_type == "ADALORA" or shared:
        raise ArtefactError(
            f"an artefact holds LoRA adapters, got {config.peft_type.value} of PEFT, which cannot be read back from "
            "layers alone: merge it with merge_and_unload, and save with full=True"
        )


def _compare(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    differences = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "mismatched": {key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape},
    }
    for what, keys in differences.items():
        if keys:
            raise ArtefactError(
                f"{folder} must fit the model's layers key by key, got {len(keys)} {what} keys, among them "
                f"{min(keys)}; get a new copy, or load it with the versions that made it"
            )
    if meta := [key for key, held in expected.items() if held.is_meta]:  # where values vanish without a word
        raise ArtefactError(
            f"{folder} must be loaded into layers that are in memory, got {len(meta)} keys of offloaded ones, among "
            f"them {min(meta)}: give a device_map without offloading"
        )
