"""LoRA adapters of a model's text decoder, by way of PEFT: put on, found, left out for a while."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from gazepatch.errors import TrainingError

#: What PEFT calls an adapter that has no other name.
NAME = "default"


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
    source = getattr(model, "name_or_path", None)
    put_on(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, base_model_name_or_path=source))


def put_on(model: Any, config: Any) -> None:
    """Put an adapter of PEFT with these settings on a model of transformers, as `NAME`."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, NAME)
    model._hf_peft_config_loaded = True  # as add_adapter of transformers does


def adapter_weights(model: Any, name: str) -> dict[str, Tensor]:
    """All that an adapter trains, the parameters themselves, under the keys that PEFT stores them by."""
    from peft import get_peft_model_state_dict

    state = model.state_dict(keep_vars=True)
    # Embeddings that were not trained are the base model's: PEFT would look at their number on the Hub.
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    return weights


def adapter_layers(model: Any) -> list[Any]:
    """The layers of a model of transformers that adapters of PEFT are on."""
    if not getattr(model, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def has_lora(model: Any) -> bool:
    """Whether a model of transformers carries adapters of PEFT, its own or those of a model of PEFT around it."""
    return bool(adapter_layers(model))


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """The model without its adapters for the length of a `with` block."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = [layer for layer in [*adapter_layers(model), *copies] if not layer.disable_adapters]
    _enable(layers, False)
    try:
        yield
    finally:
        _enable(layers, True)


def _enable(layers: list[Any], enabled: bool) -> None:
    """Switch adapters, and leave what learns as it was: PEFT changes that too."""
    learns = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(enabled)
    for parameter, learned in learns:
        parameter.requires_grad_(learned)
