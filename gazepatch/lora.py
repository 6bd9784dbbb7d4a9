"""LoRA adapters of a model's text decoder, by way of PEFT: put on, found, left out for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers.utils.peft_utils import check_peft_version

from gazepatch.errors import TrainingError

#: The oldest that was tried. Transformers may ask for a newer one, but only its own methods need that.
MIN_PEFT_VERSION = "0.19.1"

#: What PEFT calls an adapter that has no other name.
NAME = "default"


def missing_peft() -> str:
    """What has to be installed for adapters; empty where nothing is missing."""
    if find_spec("peft") is None:
        return "the package peft: pip install peft"
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError:
        return f"peft {MIN_PEFT_VERSION} or newer, got {version('peft')}: pip install -U peft"
    return ""


def require_peft() -> None:
    """Raise TrainingError unless there is a PEFT that is new enough."""
    if missing := missing_peft():
        raise TrainingError(f"LoRA needs {missing}, or train the context tokens alone")


def add_lora(model: Any, decoder: nn.Module, rank: int) -> None:
    """Put adapters on the linear layers of `decoder`, a part of `model`; they alone can be trained then, in float32.

    Raises:
        TrainingError: PEFT is not installed, or too old, or does not put adapters on these layers.
    """
    require_peft()
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype

    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers: Any = decoder.layers
    names = {f"{prefix}.layers.{name}" for name, part in layers.named_modules() if _is_linear(part)}
    source = getattr(model, "name_or_path", None)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names), base_model_name_or_path=source)
    try:
        put_on(model, config)
    except ValueError as error:
        raise TrainingError(f"PEFT puts no adapters on this model: {error}; train the context tokens alone") from error
    cast_adapter_dtype(model, NAME)  # small updates would vanish in fewer bits
    wanted = {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    if wrong := wanted ^ adapter_weights(model, NAME).keys():  # before anything is trained that could not be stored
        raise TrainingError(
            f"adapters must be on all linear layers of the text decoder and nowhere else, PEFT {version('peft')} made "
            f"{len(wrong)} weights too many or too few, among them {min(wrong)}: train the context tokens alone"
        )


def put_on(model: Any, config: Any) -> None:
    """Put an adapter of PEFT with these settings on a model of transformers, as `NAME`.

    Raises:
        ValueError: There are adapters on it already, or PEFT finds nothing to put these on.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import check_target_module_exists

    if has_lora(model):
        raise ValueError("there are adapters on it already, which merge_and_unload of PEFT makes part of it")
    names = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    if config.peft_type == "LORA" and names == set(config.target_modules or ()) and not config.target_parameters:
        # Layers named in full are given by keys. In the settings PEFT rewrites some names, for adapters made when
        # mixtures of experts had other layers, and the adapters would be on other layers than these.
        keys: Any = {f"{name}.lora_": None for name in names}
        config.target_modules = set()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)  # that they differ
            inject_adapter_in_model(config, model, NAME, state_dict=keys)
        config.target_modules = sorted(names)
    else:
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
    """The model without its adapters, if it has any, for the length of a `with` block."""
    if not has_lora(model):
        yield
        return
    from peft.utils.other import AuxiliaryTrainingWrapper

    copies = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = [layer for layer in [*adapter_layers(model), *copies] if not layer.disable_adapters]
    _enable(layers, False)
    try:
        yield
    finally:
        _enable(layers, True)


def _is_linear(part: nn.Module) -> bool:
    """Whether it returns what a linear layer does: a model's own subclasses do not, such as routers of experts."""
    return isinstance(part, nn.Linear) and not type(part).__module__.startswith("transformers.models.")


def _enable(layers: list[Any], enabled: bool) -> None:
    """Switch adapters, and leave what learns as it was: PEFT changes that too."""
    learns = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(enabled)
    for parameter, learned in learns:
        parameter.requires_grad_(learned)
