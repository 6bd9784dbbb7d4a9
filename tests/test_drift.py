"""What this package relies on in transformers is still there: on a failure, the message names what changed.

What the core relies on is listed here; what the adapters rely on is noted while they read tiny models, and looked up in
the families' own default configurations and functions.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VIDEO, batch, built, type_of
from transformers import AutoConfig

from gazepatch.registry import adapter_for

MLLAMA = "models.mllama.modeling_mllama.MllamaForConditionalGeneration"

#: Parameters of functions that are called or replaced; None where only the name counts.
SYMBOLS: dict[str, Any] = {
    "cache_utils.Cache.layers": None,
    "cache_utils.DynamicCache": ("config",),
    "cache_utils.DynamicLayer.update": ("key_states", "value_states"),
    "cache_utils.DynamicLayer.lazy_initialization": ("key_states", "value_states"),
    "cache_utils.DynamicLayer.get_seq_length": (),
    "cache_utils.DynamicLayer.get_mask_sizes": ("query_length",),
    "cache_utils.DynamicLayer.crop": None,
    "cache_utils.DynamicLayer.reset": (),
    "cache_utils.DynamicLayer.reorder_cache": ("beam_idx",),
    "cache_utils.DynamicLayer.batch_repeat_interleave": ("repeats",),
    "cache_utils.DynamicLayer.batch_select_indices": ("indices",),
    "cache_utils.DynamicSlidingWindowLayer.get_mask_sizes": ("query_length",),
    "cache_utils.DynamicSlidingWindowLayer": ("sliding_window",),
    "masking_utils.AttentionMaskInterface.register": ("key", "value"),
    "masking_utils.AttentionMaskInterface._global_mapping": None,
    "masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": None,
    "modeling_utils.AttentionInterface.register": ("key", "value"),
    "modeling_utils.AttentionInterface._global_mapping": None,
    "modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface": ("attn_implementation", "default"),
    "modeling_utils.PreTrainedModel.base_model": None,
    "modeling_utils.PreTrainedModel.get_decoder": (),
    "configuration_utils.PreTrainedConfig.get_text_config": ("decoder",),
    "configuration_utils.PreTrainedConfig._attn_implementation": None,
    "models.llava_next.modeling_llava_next.get_anyres_image_grid_shape": ("image_size", "grid_pinpoints", "patch_size"),
    "models.llava_next.modeling_llava_next.unpad_image": ("tensor", "original_size"),
    f"{MLLAMA}.prepare_inputs_for_generation": ("cross_attention_mask",),
    f"{MLLAMA}._update_model_kwargs_for_generation": ("outputs", "model_kwargs"),
}


@pytest.mark.parametrize("path", SYMBOLS)
def test_symbols_of_the_core(path: str) -> None:
    parts, expected = path.split("."), SYMBOLS[path]
    depth = next(i for i in range(len(parts), 0, -1) if _importable(".".join(parts[:i])))
    found: Any = importlib.import_module("transformers." + ".".join(parts[:depth]))
    for i, part in enumerate(parts[depth:], depth):
        if i == len(parts) - 1 and part == "layers":
            return  # an attribute of instances, which the annotations do not name
        assert hasattr(found, part), f"transformers.{'.'.join(parts[:i])} has no {part} any more"
        found = getattr(found, part)
    if isinstance(expected, tuple):
        names = inspect.signature(found).parameters
        missing = [name for name in expected if name not in names]
        assert not missing, f"transformers.{path}({', '.join(names)}) does not take {', '.join(missing)} any more"


def _importable(path: str) -> bool:
    try:
        importlib.import_module(f"transformers.{path}")
    except ImportError:
        return False
    return True


class Noting:
    """A configuration that notes which attributes are read, by path; what is asked for with a default may be absent."""

    def __init__(self, config: Any, noted: set[str], path: str = "") -> None:
        self._of = config, noted, path

    def __getattr__(self, name: str) -> Any:
        config, noted, path = self._of
        value = getattr(config, name)
        noted.add(path + name)
        return Noting(value, noted, f"{path}{name}.") if hasattr(value, "model_type") else value


class NotingCall(dict[str, Any]):
    """Arguments that note which of them are read, and were given."""

    def __init__(self, call: Mapping[str, Any], noted: set[str]) -> None:
        super().__init__(call)
        self.noted = noted

    def __getitem__(self, name: str) -> Any:
        self.noted.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]


CASES = [(name, video) for name in FAMILIES for video in ((False, True) if name in VIDEO else (False,))]


@pytest.mark.parametrize(("name", "video"), CASES)
def test_what_the_adapters_read(name: str, video: bool) -> None:
    case = batch(built(name, video))
    model, base = case.model, case.model.base_model
    adapter, read, used = adapter_for(model.config.model_type), set[str](), set[str]()
    modality = "video" if video else "image"
    own = {key: value for key, value in case.inputs.items() if key not in ("input_ids", "attention_mask")}
    ids = torch.where(case.inputs["attention_mask"] == 0, -1, case.inputs["input_ids"]).tolist()
    config: Any = Noting(model.config, read)
    assert adapter.locate(config, ids, {modality: NotingCall(own, used)}) == case.spans

    default = AutoConfig.for_model(type_of(name))
    for path in sorted(read):
        of: Any = default
        for part in path.split("."):
            assert hasattr(of, part), f"the configuration of {type_of(name)} has no {path} any more"
            if (of := getattr(of, part)) is None:
                break  # Gemma 4 has no vision tower unless one is given
    # Videos are sometimes encoded by the function for images (Perception LM).
    functions = [getattr(base, f"get_{kind}_features", None) for kind in (modality, "image")]
    names = {parameter for function in functions if function for parameter in inspect.signature(function).parameters}
    # Some are handed over among the keyword arguments of the function (Pixtral's image_sizes in transformers 5.16).
    forward = inspect.getsource(type(base).forward)
    missing = [name for name in sorted(used - names - {"pixel_values_videos"}) if f"{name}={name}" not in forward]
    assert not missing, f"get_{modality}_features of {type_of(name)} does not take {', '.join(missing)} any more"
    decoder = adapter.decoder(model)
    assert decoder.config is adapter.text_config(model.config), "the text decoder or its configuration is elsewhere now"
    for attribute in ("num_hidden_layers", "hidden_size"):
        assert hasattr(decoder.config, attribute), f"the decoder's configuration has no {attribute} any more"
