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
FILE_NAME = "gaze_config.json"

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


@dataclass(frozen=True)
class Manifest:
    """The content of `gaze_config.json`, in its order.

    `base_model` is a Hub id or the absolute path of a folder; `base_revision` a commit, or `None` where none is known.
    `provenance` tells how a model was trained with gaze, `fidelity` what was measured against dense: `None` if nothing.
    """

    format_version: int
    gazepatch_version: str
    transformers_version: str
    base_model: str
    base_revision: str | None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    image_geometry: Mapping[str, Any]
    gaze: GazeConfig
    provenance: Mapping[str, Any] | None = None
    fidelity: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: Any, gaze: GazeConfig, base_model: str) -> Manifest:
        """The manifest of a model, by its transformers configuration."""
        return cls(
            format_version=FORMAT_VERSION,
            gazepatch_version=version("gazepatch"),
            transformers_version=version("transformers"),
            base_model=base_model,
            base_revision=getattr(config, "_commit_hash", None),
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
            if (expected := getattr(self, name)) != found:
                raise ArtefactError(
                    f"this artefact was made for a model with {name} {_difference(expected, found)}; "
                    f"load it with its own base model, {self.base_model}, or convert the other one"
                )


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
    except ValueError as error:  # bad JSON and bad UTF-8 alike
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
    return Manifest(**(values | {"gaze": gaze}))


_NONE = type(None)
_TYPES: dict[tuple[str, ...], tuple[type, ...]] = {
    ("gazepatch_version", "transformers_version", "base_model", "model_type"): (str,),
    ("hidden_size", "num_hidden_layers"): (int,),
    ("image_geometry", "gaze"): (dict,),
    ("base_revision",): (str, _NONE),
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
        name = next(key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key))
        return f"{name} = {expected.get(name)!r}, got {found.get(name)!r}"
    return f"{expected!r}, got {found!r}"
