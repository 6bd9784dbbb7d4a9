"""`inspect`: what `apply` would do to a model, or did, with a reason for every layer that does not gaze."""

from __future__ import annotations

import inspect as signatures
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gazepatch.adapters.base import Adapter
from gazepatch.artefact.finding import artefact_folder, base_config, base_of, is_artefact
from gazepatch.artefact.manifest import read
from gazepatch.backend import choose
from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError, GazeError
from gazepatch.layers import dense_reasons
from gazepatch.layout import Span
from gazepatch.patch import is_patched, patch_of, root_model
from gazepatch.registry import adapter_for
from gazepatch.running.capture import MODALITIES


@dataclass(frozen=True)
class Inspection:
    """What gazepatch knows of a model.

    Attributes:
        family: Its model type.
        decoder: The text decoder: its model type, and its path in the model when a model was given.
        layers: Number of decoder layers. One that runs several times a token counts as often: its further runs have the
            numbers after all layers, as in a cache.
        gaze_layers: Indices of the layers that gaze.
        reasons: For every other layer: why not.
        patched: Whether `apply` is in force.
        settings: The settings in force, those of the artefact, or the defaults that `apply` would take.
        backend: What computes the routed steps, and why; or what is set, and why it cannot.
        base_model: Of an artefact: the Hub id or folder of its base model, where it names one.
        base_revision: Of an artefact: the commit of its base model on the Hub.
        spans: With inputs: where their visual tokens are.
        notes: With inputs: what was not as one might expect.
    """

    family: str
    decoder: str
    layers: int
    gaze_layers: list[int]
    reasons: dict[int, str]
    patched: bool
    settings: GazeConfig
    backend: str
    base_model: str | None = None
    base_revision: str | None = None
    spans: list[Span] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect(
    model: nn.Module | str | Path,
    inputs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    base: str | Path | None = None,
) -> Inspection:
    """Look at a model without changing it, or at a model or an artefact by name without loading any weights.

    Args:
        model: A model, patched or not; or a local folder or Hub id of a model or an artefact.
        inputs: What a processor returns for the model: its images are then located, without running the model.
        device: With a name: where the model would be, on which the backend depends.
        base: With the name of an adapter: where its base model is, as for `gazepatch.load`.

    Raises:
        UnsupportedModelError: The architecture has no adapter.
        ArtefactError: The folder holds neither a model nor an intact artefact, or `base` was given for one that has
            weights of its own.
        HubError: There is no such folder, and the Hub does not give it.
        GazeError: Inputs were given with a path, or a device with a model, or a base with what is no artefact.
    """
    if base is not None and (isinstance(model, nn.Module) or not is_artefact(model)):
        raise GazeError("base goes with the name of an adapter artefact, got a model, which is its own: leave it out")
    if isinstance(model, nn.Module):
        if device is not None:
            raise GazeError("a model is on a device already, so none must be given: move the model instead")
        return _inspect_model(model, inputs)
    if inputs is not None:
        raise GazeError("inputs can be inspected with a model, got a path: load the model first")
    where = None if device is None else torch.device(device)
    if not is_artefact(model):
        return _report(base_config(model), None, where)
    folder = artefact_folder(model)
    manifest = read(folder)
    source, revision = base_of(manifest, folder, base)
    report = _report(base_config(source, revision=revision), manifest.gaze, where)
    return replace(report, base_model=manifest.base_model, base_revision=manifest.base_revision)


def _inspect_model(model: nn.Module, inputs: Mapping[str, Any] | None) -> Inspection:
    root = root_model(model)
    settings = patch_of(model).config if is_patched(model) else None
    return _report(root.config, settings, root.device, root, inputs)


def _report(
    config: Any,
    settings: GazeConfig | None,
    device: torch.device | None,
    root: Any = None,
    inputs: Mapping[str, Any] | None = None,
) -> Inspection:
    adapter = adapter_for(config.model_type)
    text, in_force = adapter.text_config(config), settings or GazeConfig()
    reasons = dense_reasons(adapter, config, in_force)
    spans = locate(adapter, root, inputs) if inputs is not None else []
    path = ""
    if root is not None:
        decoder = adapter.decoder(root)
        path = next((f" at {name}" for name, module in root.named_modules() if module is decoder), "")
    return Inspection(
        family=config.model_type,
        decoder=f"{text.model_type}{path}",
        layers=len(reasons),
        gaze_layers=[number for number, reason in reasons.items() if reason is None],
        reasons={number: reason for number, reason in reasons.items() if reason is not None},
        patched=root is not None and is_patched(root),
        settings=in_force,
        backend=_backend(in_force.backend, device),
        spans=spans,
        notes=_notes(spans, in_force, inputs, root),
    )


def _backend(setting: str, device: torch.device | None) -> str:
    try:
        return ": ".join(choose(setting, device))
    except ConfigError as error:  # the rest is worth knowing all the same
        return f"{setting}: cannot run here: {error}"


def locate(adapter: Adapter, root: Any, inputs: Mapping[str, Any]) -> list[Span]:
    """Spans of a processor's output, without running the model."""
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids) or ids.dim() != 2:
        raise GazeError(f"inputs must hold input_ids of shape [B, S], got {type(ids).__name__}")
    mask = inputs.get("attention_mask")
    if torch.is_tensor(mask) and mask.shape == ids.shape:
        ids = torch.where(mask == 0, -1, ids)
    if adapter.cross_attention:  # nothing in the sequence tells
        return adapter.locate(root.config, ids.tolist(), {"image": inputs})
    calls = {modality: call for modality in MODALITIES if (call := _call(root, modality, inputs))}
    return adapter.locate(root.config, ids.tolist(), calls)


def _call(root: Any, modality: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a forward would make the features of `modality` from; empty when it would make none."""
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[modality]
    function = getattr(root.base_model, f"get_{modality}_features", None)
    if function is None or inputs.get(pixels) is None:
        return {}
    call = {name: value for name, value in inputs.items() if name not in ("input_ids", "pixel_values")}
    # Some functions for videos call their pixels just that (transformers 5.16).
    names = signatures.signature(function).parameters
    return call | {pixels if pixels in names else "pixel_values": inputs[pixels]}


def _notes(spans: list[Span], settings: GazeConfig, inputs: Mapping[str, Any] | None, root: Any) -> list[str]:
    if inputs is None:
        return []
    if not spans:
        return ["no visual tokens: the model behaves as if it were not patched"]
    notes = []
    if settings.prefill == "dense" and _without_cache(root):
        notes.append(
            "the model's generation config says use_cache=false, and nothing gazes without a cache: pass "
            "use_cache=True to generate, as the commands do"
        )
    if without := [span for span in spans if span.grid is None]:
        where = ", ".join(f"row {span.row} [{span.start}, {span.stop})" for span in without)
        notes.append(f"the grid is not known at {where}: regions are one-dimensional runs there")
    minimum = settings.min_visual_tokens
    for row, tokens in read_whole(spans, minimum).items():
        few = f"row {row} has {tokens} visual tokens, fewer than min_visual_tokens={minimum}"
        notes.append(f"{few}: it is read whole (with 0 it would gaze)")
    return notes


def _without_cache(root: Any) -> bool:
    """Whether `generate` keeps no cache unless it is told to; None is transformers' default, to keep one."""
    return getattr(getattr(root, "generation_config", None), "use_cache", None) is False


def read_whole(spans: Iterable[Span], minimum: int) -> dict[int, int]:
    """Rows with images that have too few visual tokens to gaze, fewer than `minimum`, and how many they have."""
    tokens: Counter[int] = Counter()
    for span in spans:
        tokens[span.row] += span.tokens
    return {row: tokens[row] for row in sorted(tokens) if tokens[row] < minimum}
