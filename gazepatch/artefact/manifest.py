"""`gaze_config.json`: what an artefact says of itself, read without mercy and compared with a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gazepatch.config import GazeConfig
from gazepatch.errors import ArtefactError, ConfigError

FORMAT_VERSION = 1

# What an artefact's folder holds, beside context tokens, and the model's own files if it is a full one.
FILE_NAME = "gaze_config.json"
CARD_NAME = "README.md"
LORA_NAME = "lora"

# Settings that decide how an image becomes a grid of tokens, under the names transformers gives them.
GEOMETRY = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "spatial_patch_size")
MODEL_GEOMETRY = (
    "downsample_ratio",
    "image_grid_pinpoints",
    "image_seq_length",
    "image_token_id",
    "mm_tokens_per_image",
    "scale_factor",
    "spatial_merge_size",
    "video_token_id",
    "vision_aspect_ratio",
    "vision_feature_select_strategy",
)
# Those of an image processor that nobody may change without changing the model.
PROCESSOR_GEOMETRY = ("patch_size", "merge_size", "temporal_patch_size")


@dataclass(frozen=True)
class Manifest:
    """The content of `gaze_config.json`, in its order.

    Attributes:
        format_version: Of the artefact.
        gazepatch_version, transformers_version: What made it.
        full: Whether the weights of the model lie in the same folder. If not, they are those of the base model.
        base_model: A Hub id, or the absolute path of a folder; in a full artefact a Hub id, or `None` if there is none.
        base_revision: A commit, or `None` where none is known.
        model_type, hidden_size, num_hidden_layers: Of the model, the latter two of its text decoder.
        image_geometry: Settings of the model that decide how an image becomes a grid of tokens.
        processor_geometry: The same of its image processor, as far as its files say.
        key_layout: Fingerprint of the names and shapes of all tensors, where the weights were at hand.
        gaze: The settings.
        provenance: How it was trained with gaze, `None` if nothing is recorded of that.
        fidelity: What was measured against dense, `None` if nothing.
    """

    format_version: int
    gazepatch_version: str
    transformers_version: str
    full: bool
    base_model: str | None
    base_revision: str | None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    image_geometry: Mapping[str, Any]
    processor_geometry: Mapping[str, Any]
    key_layout: str | None
    gaze: GazeConfig
    provenance: Mapping[str, Any] | None = None
    fidelity: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: Any, gaze: GazeConfig, base_model: str | None) -> Manifest:
        """The manifest of an adapter folder, by the transformers configuration of its model."""
        return cls(
            format_version=FORMAT_VERSION,
            gazepatch_version=version("gazepatch"),
            transformers_version=version("transformers"),
            full=False,
            base_model=base_model,
            base_revision=getattr(config, "_commit_hash", None),
            processor_geometry={},
            key_layout=None,
            gaze=gaze,
            **facts(config),
        )

    def to_json(self) -> str:
        """The text of the file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps(values | {"gaze": self.gaze.to_dict()}, indent=2) + "\n"

    def check(self, config: Any) -> None:
        """Refuse a model that differs from the one this artefact was made for.

        Raises:
            ArtefactError: Names the first difference, with both values.
        """
        for name, found in facts(config).items():
            self._compare(name, found)

    def check_files(self, processor_geometry: Mapping[str, Any], key_layout: str | None) -> None:
        """Refuse a processor or weights that differ from those this artefact was made for, as far as both are known.

        Raises:
            ArtefactError: Names the first difference, with both values.
        """
        if self.processor_geometry and processor_geometry:
            self._compare("processor_geometry", processor_geometry)
        if self.key_layout is not None and key_layout is not None:
            self._compare("key_layout", key_layout)

    def _compare(self, name: str, found: Any) -> None:
        if (expected := getattr(self, name)) != found:
            own = "the files that came with it" if self.full else f"its own base model, {self.base_model}"
            raise ArtefactError(
                f"this artefact was made for a model with {name} {_difference(expected, found)}; "
                f"load it with {own}, or convert the other one"
            )


def processor_geometry(source: str, **kwargs: Any) -> dict[str, Any]:
    """What the image processor of a model says of `PROCESSOR_GEOMETRY`, by folder or Hub id; `{}` if there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source, **kwargs)
    except (OSError, ValueError, RecursionError):  # no such file, or one that only its own class understands
        return {}
    return {name: values[name] for name in PROCESSOR_GEOMETRY if values.get(name) is not None}


def facts(config: Any) -> dict[str, Any]:
    """What an artefact and its model must agree on."""
    from gazepatch.registry import adapter_for

    text = adapter_for(config.model_type).text_config(config)
    vision = getattr(config, "vision_config", None)
    geometry = {name: getattr(config, name, None) for name in MODEL_GEOMETRY}
    geometry |= {f"vision_config.{name}": getattr(vision, name, None) for name in GEOMETRY}
    known = {name: value for name, value in geometry.items() if value is not None}
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "image_geometry": json.loads(json.dumps(known)),  # tuples become lists, as in the file
    }


def read(folder: Path) -> Manifest:
    """The manifest of an artefact folder, every key and type of it checked.

    Raises:
        ArtefactError: There is none, or something in it is missing, unknown, of the wrong type or too new.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ArtefactError(
            f"an artefact is a folder with {FILE_NAME}, got {'a file' if folder.exists() else 'nothing'} at {folder}"
        )
    if not path.is_file():
        raise ArtefactError(
            f"no {FILE_NAME} in {folder}: make an artefact with gazepatch.convert, or gazepatch.apply to a plain model"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 alike, and JSON nested without end
        raise ArtefactError(f"{path} must be JSON: {error}; the file is damaged, make the artefact again") from None
    try:
        return _parse(values)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from None


def _parse(values: Any) -> Manifest:
    if not isinstance(values, dict):
        raise ArtefactError(f"must be a JSON object, got {type(values).__name__}")
    # The version first: a newer format may well have other keys.
    _check_type("format_version", values.get("format_version", FORMAT_VERSION), int)
    if values.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise ArtefactError(
            f"format version {values['format_version']} is newer than {FORMAT_VERSION}, the newest that gazepatch "
            f"{version('gazepatch')} reads: upgrade gazepatch"
        )
    _check_keys("", values, [field.name for field in dataclasses.fields(Manifest)])
    if values["format_version"] != FORMAT_VERSION:
        raise ArtefactError(f"format_version must be {FORMAT_VERSION}, got {values['format_version']}")
    for names, kinds in _TYPES.items():
        for name in names:
            _check_type(name, values[name], *kinds)
    _check_keys(" in gaze", values["gaze"], [field.name for field in dataclasses.fields(GazeConfig)])
    try:
        gaze = GazeConfig.from_dict(values["gaze"])
    except ConfigError as error:
        raise ArtefactError(f"gaze: {error}") from None
    if values["base_model"] is None and not values["full"]:
        raise ArtefactError("base_model must be a folder or a Hub id where full is false, got null")
    return Manifest(**(values | {"gaze": gaze}))


_NONE = type(None)
_TYPES: dict[tuple[str, ...], tuple[type, ...]] = {
    ("gazepatch_version", "transformers_version", "model_type"): (str,),
    ("hidden_size", "num_hidden_layers"): (int,),
    ("full",): (bool,),
    ("image_geometry", "processor_geometry", "gaze"): (dict,),
    ("base_model", "base_revision", "key_layout"): (str, _NONE),
    ("provenance", "fidelity"): (dict, _NONE),
}


def _check_type(name: str, value: object, *kinds: type) -> None:
    if type(value) not in kinds:  # exactly: True is no integer here
        wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in kinds)
        raise ArtefactError(f"{name} must be {wanted}, got {value!r}")


def _check_keys(where: str, values: Mapping[str, Any], expected: list[str]) -> None:
    if missing := [name for name in expected if name not in values]:
        raise ArtefactError(
            f"missing key{where}: {', '.join(missing)}; nothing has a default here, make the artefact again"
        )
    if unknown := sorted(values.keys() - set(expected)):
        raise ArtefactError(
            f"unknown key{where}: {', '.join(unknown)}; take it out if you added it, or upgrade gazepatch"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def _difference(expected: Any, found: Any) -> str:
    """Both values; of two mappings only the first entry that differs."""
    if isinstance(expected, Mapping):
        absent = object()
        names = sorted(expected.keys() | found.keys())
        name = next(name for name in names if expected.get(name, absent) != found.get(name, absent))
        return f"{name} = {expected.get(name, 'nothing')!r}, got {found.get(name, 'nothing')!r}"
    return f"{expected!r}, got {found!r}"
